"""A seeded fraction of a data set: the same items for a baseline and for all peers, whatever their own seeds."""

from __future__ import annotations

import numpy


def kept_items(count: int, fraction: float, seed: int) -> numpy.ndarray:
    """Which of `count` items a fraction holds; draws with a generator of its own.

    Args:
        count: items in the whole set.
        fraction: above 0, up to 1; at least one item is kept.
        seed: which ones.

    Returns:
        (count,) booleans.
    """
    kept = numpy.zeros(count, dtype=bool)
    kept[numpy.random.default_rng(seed).permutation(count)[: max(1, round(fraction * count))]] = True
    return kept
