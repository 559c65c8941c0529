"""Task `codistill_translation`: a seeded part of the training set."""

import numpy
import pytest
from fairseq import tasks
from fairseq.data import LanguagePairDataset, data_utils
from fairseq.tasks.translation import TranslationTask

from fairseq_codistill.task import Fraction
from tests.fairseq_codistill.toy_host import Host, configure, data, dictionary, sentences  # noqa: F401

COUNT = 50


@pytest.fixture
def whole():
    words = dictionary()
    pairs = sentences(COUNT)
    source, target = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return LanguagePairDataset(source, [len(s) for s in source], words, target, [len(t) for t in target], words)


@pytest.fixture
def task_of(data, whole, monkeypatch):  # noqa: F811
    """The task for some flags, whose splits are all the same small dataset."""

    def load(self, split, epoch=1, combine=False, **kwargs):
        self.datasets[split] = whole

    monkeypatch.setattr(TranslationTask, "load_dataset", load)
    return lambda *flags: tasks.setup_task(configure(data, "--task", "codistill_translation", *flags).task)


def trained_on(dataset, seed=1):
    with data_utils.numpy_seed(seed):
        return dataset.ordered_indices().tolist()


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 25), (0.1, 5), (0.02, 1), (0.0001, 1)])
def test_a_fraction_keeps_so_many_different_items(whole, fraction, count):
    kept = trained_on(Fraction(whole, fraction, seed=0))
    assert len(kept) == len(set(kept)) == count


def test_the_data_seed_alone_decides_which(whole):
    kept = {seed: set(trained_on(Fraction(whole, 0.5, seed=0), seed=seed)) for seed in (1, 2)}
    assert kept[1] == kept[2]
    numpy.random.seed(5)
    assert set(trained_on(Fraction(whole, 0.5, seed=0))) == kept[1]
    assert set(trained_on(Fraction(whole, 0.5, seed=1))) != kept[1]


def test_drawing_the_fraction_leaves_the_hosts_generator_alone(whole):
    before = numpy.random.get_state()[1].tolist()
    Fraction(whole, 0.5, seed=0)
    assert numpy.random.get_state()[1].tolist() == before


def test_items_keep_their_order_index_and_content(whole):
    part = Fraction(whole, 0.5, seed=3)
    order = trained_on(whole)
    assert trained_on(part) == [index for index in order if index in set(trained_on(part))]
    for index in trained_on(part):
        assert part[index]["source"].tolist() == whole[index]["source"].tolist()


def test_only_the_training_set_is_cut(task_of, whole):
    task = task_of("--codistill-data-fraction", "0.2", "--codistill-data-seed", "3")
    for split in ("train", "valid", "test"):
        task.load_dataset(split)
    assert len(trained_on(task.dataset("train"))) == 10
    assert task.dataset("valid") is task.dataset("test") is whole


def test_a_training_set_of_another_name_is_cut_too(task_of, whole):
    task = task_of("--codistill-data-fraction", "0.2", "--train-subset", "train-clean")
    for split in ("train-clean", "train"):
        task.load_dataset(split)
    assert len(trained_on(task.dataset("train-clean"))) == 10
    assert task.dataset("train") is whole


def test_everything_is_the_default_and_changes_nothing(task_of, whole):
    task = task_of()
    task.load_dataset("train")
    assert task.dataset("train") is whole


def shards_of(task_of, data, peers, *flags):  # noqa: F811
    """What each peer trains on, when the criterion is built before the data are loaded, as fairseq-train does."""
    found = []
    for peer in range(peers):
        numbers = ("--codistill-peer", str(peer), "--codistill-peers", str(peers), "--codistill-dir", str(data))
        task = task_of("--codistill-data-shard", *numbers, *flags)
        task.build_criterion(configure(data, *numbers).criterion)
        task.load_dataset("valid")
        task.load_dataset("train")
        assert len(trained_on(task.dataset("valid"))) == COUNT
        found.append(trained_on(task.dataset("train"), seed=peer))
    return found


@pytest.mark.parametrize(("flags", "count"), [((), COUNT), (("--codistill-data-fraction", "0.5"), 25)])
def test_each_peer_trains_on_a_part_of_its_own_and_together_on_everything(task_of, data, flags, count):  # noqa: F811
    parts = shards_of(task_of, data, 3, *flags)
    assert len({item for part in parts for item in part}) == sum(map(len, parts)) == count
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [set(part) for part in shards_of(task_of, data, 3, *flags)] == [set(part) for part in parts]


def test_one_peer_alone_keeps_the_whole_as_its_part(task_of, data):  # noqa: F811
    [part] = shards_of(task_of, data, 1)
    assert len(part) == COUNT


def test_a_part_of_ones_own_without_the_criterion_is_one_line(task_of):
    task = task_of("--codistill-data-shard")
    task.load_dataset("valid")
    with pytest.raises(SystemExit) as ended:
        task.load_dataset("train")
    assert ended.value.code == (
        "--codistill-data-shard: needs --criterion codistill, which knows the peers; add it, or leave this out"
    )


def test_a_part_of_ones_own_where_all_go_through_the_same_batches_is_one_line(data):  # noqa: F811
    task = ("--task", "codistill_translation", "--codistill-data-shard")
    with pytest.raises(SystemExit) as ended:
        Host(data, *task, "--codistill-exchange", "prediction", "--codistill-dir", str(data))
    assert ended.value.code == (
        "--codistill-data-shard: with --codistill-exchange prediction all peers train on the same batches; "
        "leave one of them out"
    )


def test_batches_hold_the_fraction_and_nothing_else(task_of):
    task = task_of("--codistill-data-fraction", "0.5")
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_tokens=40).next_epoch_itr(shuffle=False)
    assert sorted(i for b in batches for i in b["id"].tolist()) == sorted(trained_on(task.dataset("train")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--codistill-data-fraction", "0"],
            "--codistill-data-fraction 0.0: must be above 0 and at most 1; leave it out to train on everything",
        ),
        (
            ["--codistill-data-fraction", "1.5"],
            "--codistill-data-fraction 1.5: must be above 0 and at most 1; leave it out to train on everything",
        ),
        (
            ["--codistill-data-fraction", "nan"],
            "--codistill-data-fraction nan: must be above 0 and at most 1; leave it out to train on everything",
        ),
        (["--codistill-data-seed", "-1"], "--codistill-data-seed -1: must be 0 or more"),
    ],
)
def test_a_bad_flag_ends_the_process_with_exactly_this_line(data, flags, message):  # noqa: F811
    with pytest.raises(SystemExit) as ended:
        Host(data, "--task", "codistill_translation", "--codistill-peers", "1", *flags)
    assert ended.value.code == message
