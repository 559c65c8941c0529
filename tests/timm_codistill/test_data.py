"""The part of the data that is the same for all peers, and the order that is not."""

import types

import pytest
from timm.data import create_dataset
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from codistill import ConfigError, DataConfig
from recipes.embedded.vision.data import write_digits
from timm_codistill.data import SEED_STRIDE, fingerprint, keep_fraction, offset_sampler, seed_offset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", size=8)


def train_split(folder):
    return create_dataset("", root=str(folder), split="train", is_training=True)


def test_the_digits_are_an_image_folder(folder):
    assert len(train_split(folder)) == 1437
    assert len(create_dataset("", root=str(folder), split="validation")) == 360
    image, label = train_split(folder)[0]
    assert (image.size, label) == ((8, 8), 0)


def test_a_fraction_shortens_the_reader_and_leaves_the_transform_where_timm_sets_it(folder):
    whole, part, same = (train_split(folder) for _ in range(3))
    for dataset in (part, same):
        keep_fraction(dataset, DataConfig(0.25, 3))
    part.transform = lambda image: "transformed"
    assert len(part) == 359
    assert part[0][0] == "transformed"
    assert part.reader.samples == same.reader.samples
    assert set(part.reader.samples) < set(whole.reader.samples)
    other = train_split(folder)
    keep_fraction(other, DataConfig(0.25, 4))
    assert other.reader.samples != part.reader.samples


def test_the_whole_is_left_alone(folder):
    whole = train_split(folder)
    before = whole.reader.samples
    keep_fraction(whole, DataConfig(1.0, 3))
    assert whole.reader.samples is before


def test_a_reader_without_a_list_of_samples_is_refused():
    class ReaderTfds:
        pass

    with pytest.raises(ConfigError) as error:
        keep_fraction(types.SimpleNamespace(reader=ReaderTfds()), DataConfig(0.5))
    assert str(error.value) == (
        "--codistill-data-fraction 0.5: works for folders and tar files of images, not for ReaderTfds; "
        "leave it out, or choose a part with --train-split"
    )


def test_shards_are_parts_of_the_fraction_that_do_not_overlap(folder):
    config = DataConfig(0.25, 3, data_shard=True)
    whole, *parts = (train_split(folder) for _ in range(4))
    keep_fraction(whole, config)
    for peer, part in enumerate(parts):
        keep_fraction(part, config, (peer, 3))
    shared_out = [sample for part in parts for sample in part.reader.samples]
    assert sorted(shared_out) == sorted(whole.reader.samples)
    assert len(shared_out) == len(set(shared_out)) == 359
    assert {len(part) for part in parts} == {119, 120}


def test_a_shard_of_what_has_no_list_of_samples_or_too_few_is_refused(folder):
    with pytest.raises(ConfigError) as error:
        keep_fraction(types.SimpleNamespace(reader=object()), DataConfig(data_shard=True), (0, 2))
    assert str(error.value) == (
        "--codistill-data-shard: works for folders and tar files of images, not for object; "
        "leave it out, or choose a part with --train-split"
    )
    with pytest.raises(ConfigError) as error:
        keep_fraction(train_split(folder), DataConfig(0.001, data_shard=True), (1, 2))
    assert str(error.value) == (
        "--codistill-data-shard: 1437 samples cannot be shared out among 2 peers; "
        "leave it out, or have fewer --codistill-peers"
    )


def test_the_fingerprint_is_of_the_classes_and_their_names(folder):
    dataset = train_split(folder)
    wrapped = types.SimpleNamespace(dataset=dataset)  # as AugMixDataset does
    renamed = train_split(folder)
    renamed.reader.class_to_idx = {**renamed.reader.class_to_idx, "0": 1, "1": 0}
    assert fingerprint(10, dataset) == fingerprint(10, wrapped)
    others = [fingerprint(11, dataset), fingerprint(10, renamed), fingerprint(10, object())]
    assert len({fingerprint(10, dataset), *others}) == 4
    keep_fraction(dataset, DataConfig(0.1))
    assert fingerprint(10, dataset) == fingerprint(10, wrapped)


@pytest.mark.parametrize("repeated", [False, True])
def test_each_peer_goes_through_the_data_in_an_order_of_its_own_and_peer_0_in_timm_s(repeated):
    def order(peer, epoch):
        items = list(range(600))
        kind = RepeatAugSampler if repeated else DistributedSampler
        loader = DataLoader(items, batch_size=5, sampler=kind(items, num_replicas=2, rank=1))
        loader.sampler.set_epoch(epoch)
        offset_sampler(loader, seed_offset(peer), epoch)
        return list(loader.sampler)

    items = list(range(600))
    stock = (RepeatAugSampler if repeated else DistributedSampler)(items, num_replicas=2, rank=1)
    stock.set_epoch(3)
    assert order(0, 3) == list(stock)
    assert len({tuple(order(peer, epoch)) for peer in (0, 1, 2) for epoch in (3, 4)}) == 6
    assert seed_offset(2) == 2 * SEED_STRIDE
