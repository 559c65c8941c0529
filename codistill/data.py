"""A seeded fraction of a data set, and a peer's own shard of it: the same for whoever uses the same data seed."""

from __future__ import annotations

import numpy

from codistill.config import CodistillConfig, ConfigError, DataConfig, flag


def kept_items(count: int, fraction: float, seed: int, shard: tuple[int, int] = (0, 1)) -> numpy.ndarray:
    """Which of `count` items are trained on; draws with a generator of its own.

    Args:
        count: items in the whole set.
        fraction: above 0, up to 1; at least one item is kept.
        seed: which ones, and how they are shared out.
        shard: (i, n): of the fraction, the i-th of n parts that do not overlap and differ in size by one item at most.

    Returns:
        (count,) booleans.
    """
    kept = numpy.zeros(count, dtype=bool)
    drawn = numpy.random.default_rng(seed).permutation(count)[: max(1, round(fraction * count))]
    kept[drawn[shard[0] :: shard[1]]] = True
    return kept


def shard(data: DataConfig, config: CodistillConfig) -> tuple[int, int]:
    """Which part of the training set is this peer's, as `kept_items` wants it.

    Raises:
        ConfigError: own parts were asked for where all peers go through the same batches.
    """
    if not data.data_shard:
        return 0, 1
    if config.exchange == "prediction":
        raise ConfigError(
            f"{flag('data_shard')}: with {flag('exchange')} prediction all peers train on the same batches; "
            "leave one of them out"
        )
    return config.peer, config.peers
