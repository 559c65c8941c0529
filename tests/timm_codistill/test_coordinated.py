"""Coordinated sampling: the batches of all peers are the same, bit for bit, and nothing else is; and catching up."""

import logging
import random

import numpy
import pytest
import torch
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader
from torch.utils.data import DataLoader, TensorDataset

from codistill import ConfigError, DataConfig, Position
from recipes.embedded.vision.data import write_digits
from timm_codistill.coordinated import Sampling
from timm_codistill.data import keep_fraction

CPU = torch.device("cpu")
MIXING = {"mixup_alpha": 0.4, "cutmix_alpha": 0.4, "num_classes": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", size=8)


def seed_all(seed):
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def digits(folder, workers, prefetcher):
    """A loader as train.py makes it, with everything that draws at random."""
    dataset = create_dataset("", root=str(folder), split="train", is_training=True)
    keep_fraction(dataset, DataConfig(0.04))
    return create_loader(
        dataset,
        input_size=(3, 16, 16),
        batch_size=8,
        is_training=True,
        re_prob=0.5,
        re_mode="pixel",
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5",
        collate_fn=FastCollateMixup(**MIXING) if prefetcher else None,
        num_workers=workers,
        use_prefetcher=prefetcher,
        persistent_workers=False,
        device=CPU,
    )


def sampling(epoch=1, group=1, seed=0, rank=0):
    made = Sampling(seed, rank, CPU)
    made.begin_epoch(epoch, group)
    return made


def seen(loader, mix=None, **how):
    """The batches of an epoch, and what dropout draws between them."""
    made = sampling(**how)
    mix = made.mixing(mix) if mix is not None else lambda *batch: batch
    return [(*mix(*batch), torch.rand(3)) for batch in made.batches(loader)]


def same(ours, theirs, part):
    assert len(ours) == len(theirs) > 3
    return all(torch.equal(one[part], other[part]) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("prefetcher", [True, False], ids=["prefetcher", "no prefetcher"])
@pytest.mark.parametrize("workers", [0, 2])
def test_peers_see_the_same_batches_bit_for_bit_and_draw_dropout_of_their_own(folder, workers, prefetcher):
    found = []
    for peer in (0, 1):
        seed_all(peer)
        mix = None if prefetcher else Mixup(**MIXING)
        loader = digits(folder, workers, prefetcher)
        found.append([seen(loader, mix, epoch=epoch) for epoch in ((1, 2) if peer == 0 else (2,))][-1])
    assert same(*found, 0)
    assert same(*found, 1)
    assert not same(*found, 2)


def test_another_epoch_worker_or_data_seed_gives_other_batches(folder):
    loader = digits(folder, 0, prefetcher=True)
    first, *others = (seen(loader, **how) for how in ({}, {"epoch": 2}, {"rank": 1}, {"seed": 1}))
    for other in others:
        assert not same(first, other, 0)


def test_the_process_s_own_generators_do_not_notice_that_batches_are_drawn(folder):
    seed_all(5)
    before, made = states(), sampling()
    mix = made.mixing(Mixup(**MIXING))
    for images, labels in made.batches(digits(folder, 0, prefetcher=False)):
        mix(images, labels)
    assert states() == before


def test_whatever_else_a_loader_or_mixup_is_asked_goes_to_the_host_s_own(folder):
    loader, made = digits(folder, 0, prefetcher=True), sampling()
    batches = made.batches(loader)
    assert (len(batches), batches.sampler, batches.mixup_enabled) == (len(loader), loader.sampler, True)
    batches.mixup_enabled = False  # as train.py does
    assert not loader.mixup_enabled
    mix = Mixup(**MIXING)
    made.mixing(mix).mixup_enabled = False
    assert not mix.mixup_enabled


def test_workers_that_outlive_an_epoch_are_refused():
    loader = DataLoader(TensorDataset(torch.arange(4)), num_workers=1, persistent_workers=True)
    with pytest.raises(ConfigError) as error:
        sampling().batches(loader)
    assert str(error.value) == (
        "--codistill-exchange prediction: the workers of the training loader must not outlive an epoch; "
        "give it persistent_workers=False"
    )


class Drawing:
    """Nine batches that hold a random number each, as if they were augmented."""

    def __len__(self):
        return 9

    def __iter__(self):
        return ((number, random.random()) for number in range(9))


def run(targets, group=1, epochs=3):
    """All positions gone through; at those in `targets` the codistiller says where to go on."""
    made, found = Sampling(0, 0, CPU), []
    for epoch in range(1, epochs + 1):
        made.begin_epoch(epoch, group)
        assert made.position is None
        for number, drawn in made.batches(Drawing()):
            assert made.position == Position(epoch, number)
            found.append((epoch, number, drawn, made.mixing(random.random)()))
            if (epoch, number) in targets:
                made.skip_to(Position(*targets[epoch, number]))
    return found


WHOLE = run({})


@pytest.mark.parametrize(
    ("targets", "group", "skipped"),
    [
        ({(1, 2): (1, 6)}, 1, [(1, 3), (1, 4), (1, 5)]),
        ({(1, 2): (1, 6), (1, 6): (1, 8)}, 1, [(1, 3), (1, 4), (1, 5), (1, 7)]),
        ({(1, 2): (1, 3)}, 1, []),  # it comes next anyhow
        ({(2, 2): (1, 6)}, 1, []),  # it is past
        ({(1, 3): (2, 0)}, 1, [(1, number) for number in range(4, 9)]),
        ({(1, 3): (2, 4)}, 1, [*((1, number) for number in range(4, 9)), (2, 1), (2, 2), (2, 3)]),
        ({(1, 7): (3, 0)}, 1, [(1, 8), *((2, number) for number in range(1, 9))]),
        ({(1, 7): (9, 4)}, 1, [(1, 8), *((epoch, number) for epoch in (2, 3) for number in range(1, 9))]),
        ({(1, 8): (2, 2)}, 1, [(2, 1)]),  # said at the last batch of an epoch
        ({(1, 2): (1, 20)}, 1, [(1, number) for number in range(3, 9)]),
        # Whole updates only: the one at hand is ended, and the target's is not cut short.
        ({(1, 2): (1, 7)}, 2, [(1, 4), (1, 5)]),
        ({(1, 1): (1, 5)}, 4, []),
        ({(2, 1): (3, 8)}, 4, [*((2, number) for number in range(4, 9)), *((3, number) for number in range(4, 8))]),
    ],
)  # fmt: skip
def test_a_peer_that_is_behind_skips_to_where_the_others_are_and_draws_what_they_draw(targets, group, skipped):
    assert run(targets, group) == [line for line in WHOLE if line[:2] not in skipped]


@pytest.mark.parametrize(
    ("target", "skipped", "batch"), [((3, 4), 16, 4), ((3, 0), 13, 0), ((3, 1), 13, 1), ((3, 2), 14, 2)]
)
def test_what_was_skipped_is_said_once(caplog, target, skipped, batch):
    with caplog.at_level(logging.INFO, "codistill"):
        run({(1, 3): target})
    assert [record.getMessage() for record in caplog.records] == [
        f"codistill: skipped {skipped} micro-batches to meet the other peers; going on at epoch 3, batch {batch}"
    ]
