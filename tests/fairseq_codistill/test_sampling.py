"""All peers go through the same micro-batches, know where they are, and skip to where the others are."""

import functools
import threading

import pytest
from fairseq import tasks
from fairseq.data import LanguagePairDataset, iterators

from codistill import ConfigError, Position
from fairseq_codistill.sampling import TrainingData, end_loaders
from tests.fairseq_codistill.toy_host import Host, configure, dictionary, sentences

COUNT = 60
EPOCHS = 3
ANEW = ("--update-epoch-batch-itr", "True")
KINDS = [(), ("--update-ordered-indices-seed",), ANEW, (*ANEW, "--update-ordered-indices-seed")]


configure = functools.cache(configure)
FAIRSEQS_OWN = iterators.GroupedIterator


@pytest.fixture(autouse=True)
def fairseqs_own_iterator():
    assert iterators.GroupedIterator is FAIRSEQS_OWN
    yield
    iterators.GroupedIterator = FAIRSEQS_OWN
    end_loaders()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dictionaries alone."""
    made = tmp_path_factory.mktemp("data")
    for side in ("src", "tgt"):
        dictionary().save(str(made / f"dict.{side}.txt"))
    return made


class Loop:
    """fairseq-train's loop over the training set of one worker, without a model.

    Attributes:
        seen: the position and the sentences of every micro-batch.
        updates: how many micro-batches each update had.
        ended: the epochs that came to their end, as fairseq's iterator says.
    """

    def __init__(self, folder, *flags, coordinated=True, frequency=1, shards=(0, 1), workers=0):
        self.cfg = configure(folder, *flags)
        self.task = tasks.setup_task(self.cfg.task)
        words, pairs = dictionary(), sentences(COUNT)
        source, target = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        sizes = [[len(s) for s in side] for side in (source, target)]
        for split in ("train", "valid"):
            self.task.datasets[split] = LanguagePairDataset(source, sizes[0], words, target, sizes[1], words)
        self.data = TrainingData(self.task, self.cfg) if coordinated else None
        self.frequency, self.shards, self.workers = frequency, shards, workers
        self.seen, self.updates, self.ended = [], [], []

    def iterator(self, split="train", epoch=1):
        """What the trainer gets for `epoch`."""
        common, dataset = self.cfg.common, self.cfg.dataset
        return self.task.get_batch_iterator(
            dataset=self.task.dataset(split),
            max_sentences=3,
            seed=common.seed + epoch if dataset.update_ordered_indices_seed else common.seed,
            num_shards=self.shards[1],
            shard_id=self.shards[0],
            num_workers=self.workers,
            epoch=epoch,
            data_buffer_size=4,
            skip_remainder_batch=self.cfg.optimization.skip_remainder_batch,
            update_epoch_batch_itr=dataset.update_epoch_batch_itr,
        )

    def run(self, targets=None, saved=None, stop=None):
        """Go through the epochs; after the micro-batch at a position of `targets` go on where that says.

        `saved` is where to resume; at `stop` the loop ends, and what a checkpoint would hold is given back.
        """
        batches = self.iterator(epoch=1 if saved is None else saved["epoch"])
        if saved is not None:
            batches.load_state_dict(saved)
        while batches.next_epoch_idx <= EPOCHS:
            epoch = batches.next_epoch_itr(shuffle=True)
            skip = self.cfg.optimization.skip_remainder_batch
            updates = iterators.GroupedIterator(epoch, self.frequency, skip_remainder_batch=skip)
            for samples in updates:
                self.updates.append(len(samples))
                for sample in samples:
                    position = self.data.next_position() if self.data is not None else None
                    self.seen.append((position, tuple(sample["id"].tolist()) if sample else ()))
                    target = (targets or {}).get(position)
                    if target is not None:
                        self.data.go_on_at(Position(*target))
                assert updates.has_next() != batches.end_of_epoch()
                if position is not None and position == stop:
                    return batches.state_dict()
            assert batches.end_of_epoch()
            self.ended.append(batches.epoch)
            batches = self.iterator(epoch=batches.next_epoch_idx)
        return None

    @property
    def positions(self):
        return [tuple(vars(position).values()) for position, _ in self.seen]


@pytest.fixture(scope="module")
def whole(folder):
    """Peer 0, that nothing happened to."""
    loop = Loop(folder, "--seed", "1")
    loop.run()
    iterators.GroupedIterator = FAIRSEQS_OWN
    return loop


def test_positions_count_the_micro_batches_of_each_epoch(whole):
    each = COUNT // 3
    assert whole.positions == [(epoch, batch) for epoch in range(1, EPOCHS + 1) for batch in range(each)]
    assert whole.ended == [1, 2, 3]


def test_peers_with_seeds_of_their_own_see_the_same_batches_in_the_same_order(folder, whole):
    other = Loop(folder, "--seed", "2")
    other.run()
    assert other.seen == whole.seen
    orders = [[ids for position, ids in whole.seen if position.epoch == epoch] for epoch in (1, 2)]
    assert orders[0] != orders[1]


def test_without_it_they_see_what_fairseq_shows_them(folder, whole):
    apart = []
    for seed in ("1", "2"):
        loop = Loop(folder, "--seed", seed, coordinated=False)
        loop.run()
        apart.append(loop.seen)
    assert apart[0] != apart[1]


def test_another_iterator_than_the_training_sets_is_grouped_by_fairseq(folder):
    loop = Loop(folder)
    assert iterators.GroupedIterator is not FAIRSEQS_OWN
    assert type(iterators.GroupedIterator(loop.iterator("valid").next_epoch_itr(), 2)) is FAIRSEQS_OWN


@pytest.mark.parametrize("flags", KINDS)
def test_the_data_seed_decides_whatever_the_seed_and_in_each_epoch_anew(folder, flags):
    task = ("--task", "codistill_translation", "--codistill-peers", "1")
    found = []
    for own, shared in (("1", "5"), ("2", "5"), ("1", "6")):
        loop = Loop(folder, *task, "--seed", own, "--codistill-data-seed", shared, *flags)
        loop.run()
        found.append(loop.seen)
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_validation_is_left_alone(folder):
    ours, plain = Loop(folder, "--seed", "3"), Loop(folder, "--seed", "3", coordinated=False)
    orders = [
        [sample["id"].tolist() for sample in loop.iterator("valid").next_epoch_itr(shuffle=True)]
        for loop in (ours, plain)
    ]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("flags", KINDS)
@pytest.mark.parametrize("frequency", [1, 3])
def test_a_resumed_peer_goes_on_with_the_same_batches_at_the_same_positions(folder, frequency, flags):
    whole = Loop(folder, "--seed", "1", *flags, frequency=frequency)
    whole.run()
    begun = Loop(folder, "--seed", "2", *flags, frequency=frequency)
    saved = begun.run(stop=Position(2, 11))
    resumed = Loop(folder, "--seed", "2", *flags, frequency=frequency)
    resumed.run(saved=saved)
    assert begun.seen + resumed.seen == whole.seen


def test_accumulated_micro_batches_count_one_by_one_and_the_last_update_may_be_smaller(folder, whole):
    loop = Loop(folder, "--seed", "2", frequency=3)
    loop.run()
    assert loop.seen == whole.seen
    assert loop.updates == 3 * ([3] * 6 + [2])


def test_every_data_parallel_worker_counts_for_itself(folder):
    workers = [Loop(folder, "--seed", "1", shards=(rank, 3)) for rank in range(3)]
    for worker in workers:
        worker.run()
    assert workers[0].positions == workers[1].positions == workers[2].positions
    assert [ids for _, ids in workers[2].seen if not ids] == [()] * EPOCHS  # dummies have a position, too


def after(whole, target):
    return [entry for entry in whole.seen if entry[0] >= Position(*target)]


@pytest.mark.parametrize(
    ("target", "workers"), [((1, 9), 0), ((1, 19), 0), ((2, 0), 0), ((2, 7), 0), ((2, 7), 1), ((3, 19), 0)]
)
def test_data_is_skipped_so_that_the_next_micro_batch_is_the_one_asked_for(folder, whole, target, workers, caplog):
    caplog.set_level("INFO", "fairseq_codistill.sampling")
    loop = Loop(folder, "--seed", "2", workers=workers)
    at = Position(1, 4)
    loop.run({at: target, Position(2, 19): target})  # asked for again in the epoch that is left out
    skipped_epochs = [entry for entry in whole.seen if entry[0] == Position(2, 19)] if target[0] == 3 else []
    assert loop.seen == whole.seen[:5] + skipped_epochs + after(whole, target)
    assert loop.ended == [1, 2, 3]
    [line] = [record.message for record in caplog.records]
    assert line == (
        f"skipped {len(whole.seen) - len(loop.seen)} micro-batches, to meet the other peers from epoch {target[0]}, "
        f"micro-batch {target[1]} on"
    )


@pytest.mark.parametrize(("target", "next_one"), [((1, 12), 12), ((1, 13), 12), ((1, 14), 12), ((1, 19), 18)])
def test_whole_updates_are_skipped_and_the_next_holds_the_micro_batch_asked_for(folder, whole, target, next_one):
    loop = Loop(folder, "--seed", "2", frequency=3)
    loop.run({Position(1, 4): target, Position(1, 5): target})
    assert loop.seen == whole.seen[:6] + after(whole, (1, next_one))
    assert loop.updates == [3, 3] + [3] * ((18 - next_one) // 3) + [2] + 2 * ([3] * 6 + [2])


def test_a_target_that_is_not_asked_for_again_is_forgotten(folder, whole):
    loop = Loop(folder, "--seed", "2")
    loop.run({Position(1, 4): (3, 7)})
    assert loop.seen == whole.seen[:5] + after(whole, (2, 19))


@pytest.mark.parametrize("target", [(1, 2), (1, 5), (0, 12)])
def test_nothing_is_skipped_for_what_is_behind_or_next(folder, whole, target):
    loop = Loop(folder, "--seed", "2")
    loop.run({Position(1, 4): target})
    assert loop.seen == whole.seen


def test_a_checkpoint_after_a_skip_goes_on_there(folder, whole):
    for target in ((1, 9), (2, 0)):
        begun = Loop(folder, "--seed", "2")
        saved = begun.run({Position(1, 4): target}, stop=Position(1, 4))
        resumed = Loop(folder, "--seed", "2")
        resumed.run(saved=saved)
        assert resumed.seen == after(whole, target)


def test_the_remainder_that_fairseq_is_told_to_leave_out_stays_out(folder):
    flags = ("--skip-remainder-batch",)
    whole = Loop(folder, "--seed", "1", *flags, frequency=3)
    whole.run()
    loop = Loop(folder, "--seed", "2", *flags, frequency=3)
    loop.run({Position(1, 2): (1, 12)})
    assert loop.seen == whole.seen[:3] + after(whole, (1, 12))


def test_an_update_that_is_computed_again_has_the_same_positions(folder):
    loop = Loop(folder, "--seed", "1", frequency=3)
    updates = iterators.GroupedIterator(loop.iterator().next_epoch_itr(), 3)
    for first in (0, 3):
        next(updates)
        found = [loop.data.next_position() for _ in range(6)]
        assert found == 2 * [Position(1, first + i) for i in range(3)]


def test_skipping_leaves_no_loader_behind(folder):
    loop = Loop(folder, "--seed", "2")
    loop.run({Position(1, 1): (1, 5), Position(1, 5): (1, 9), Position(1, 9): (2, 3)})
    end_loaders()
    alive = [t for t in threading.enumerate() if isinstance(t, iterators.BackgroundConsumer)]
    assert alive == []


def test_another_loop_than_fairseq_trains_is_one_line(folder):
    with pytest.raises(ConfigError, match="needs the training loop of fairseq-train"):
        Loop(folder).data.next_position()


def test_a_task_that_streams_its_data_is_one_line(folder):
    loop = Loop(folder)
    loop.data._host_iterator = lambda dataset, **given: "a stream"
    with pytest.raises(SystemExit) as ended:
        loop.iterator()
    assert ended.value.code == (
        "--codistill-exchange prediction: task TranslationTask streams its training data, which peers cannot go "
        "through in step; use --codistill-exchange checkpoint"
    )
    assert loop.iterator("valid") == "a stream"


def test_nothing_is_touched_when_peers_are_not_in_step(folder):
    place = ("--codistill-dir", str(folder))
    off = ("--codistill-exchange", "prediction")
    for flags in ((), (*off, "--codistill-alpha", "0"), (*off, "--codistill-peers", "1")):
        host = Host(folder, *place, *flags)
        assert "get_batch_iterator" not in vars(host.task)
        assert iterators.GroupedIterator is FAIRSEQS_OWN
    host = Host(folder, *place, *off)
    assert "get_batch_iterator" in vars(host.task)
