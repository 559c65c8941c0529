"""What differs between peers in the data, and what does not.

The fraction of the training set is the same for a baseline and all peers, whatever their seeds; a shard of it, where
that was asked for, and the order in which a peer goes through it are its own (but see coordinated.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any, Optional

from codistill import ConfigError, DataConfig, flag, kept_items

SEED_STRIDE = 100_000  # between two peers' seeds: train.py itself adds a worker's rank to the seed


def seed_offset(peer: int) -> int:
    """What is added to `--seed`, and to the seed of a distributed sampler, for peer number `peer`; 0 for peer 0.

    With coordinated sampling the sampler's is that of the data seed instead, for all peers.
    """
    return SEED_STRIDE * peer


def keep_fraction(dataset: Any, config: DataConfig, shard: tuple[int, int] = (0, 1)) -> None:
    """Shorten the lists of samples that a timm data set's reader holds; its transform stays where timm sets it.

    Args:
        dataset: Of timm's, with a reader.
        config: Which fraction.
        shard: (i, n): the i-th of n parts of that fraction.

    Raises:
        ConfigError: The reader holds no such lists, or fewer samples than there are shards.
    """
    if config.data_fraction == 1 and shard[1] == 1:
        return
    reader = getattr(dataset, "reader", None)
    samples = getattr(reader, "samples", None)
    if samples is None:
        asked = flag("data_shard") if shard[1] > 1 else f"{flag('data_fraction')} {config.data_fraction}"
        raise ConfigError(
            f"{asked}: works for folders and tar files of images, "
            f"not for {type(reader or dataset).__name__}; leave it out, or choose a part with --train-split"
        )
    kept = kept_items(len(samples), config.data_fraction, config.data_seed, shard)
    if not kept.any():
        raise ConfigError(
            f"{flag('data_shard')}: {len(samples)} samples cannot be shared out among {shard[1]} peers; "
            f"leave it out, or have fewer {flag('peers')}"
        )
    for name in ("samples", "targets"):
        if hasattr(reader, name):
            setattr(reader, name, list(itertools.compress(getattr(reader, name), kept)))


def offset_sampler(loader: Any, offset: int, epoch: int) -> None:
    """Give the distributed sampler behind `loader`, if there is one, a seed of its own for the coming `epoch`.

    timm leaves `DistributedSampler.seed` at 0, and `RepeatAugSampler` knows nothing but its epoch. A single worker's
    order comes from torch's generator, hence from `--seed`.
    """
    sampler: Any = getattr(loader, "batch_sampler", None) or getattr(loader, "sampler", None)
    while hasattr(sampler, "sampler"):
        sampler = sampler.sampler
    if offset == 0 or not hasattr(sampler, "set_epoch"):
        return
    if hasattr(sampler, "seed"):
        sampler.seed = offset
    else:
        sampler.set_epoch(epoch + offset)


def fingerprint(classes: Optional[int], dataset: Any) -> str:
    """sha256 (hex) of the output space: the number of classes and, where the data set knows it, which is which."""
    known = _class_map(dataset)
    names = sorted((str(name), int(index)) for name, index in known.items()) if known else None
    return hashlib.sha256(json.dumps([classes, names]).encode()).hexdigest()


def _class_map(dataset: Any) -> Optional[Mapping[Any, int]]:
    while hasattr(dataset, "dataset") and not hasattr(dataset, "reader"):
        dataset = dataset.dataset
    for owner in (getattr(dataset, "reader", None), dataset):
        found = getattr(owner, "class_to_idx", None)
        if isinstance(found, Mapping) and found:
            return found
    return None
