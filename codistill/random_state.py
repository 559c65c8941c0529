"""Leaving the random generators alone: contract 1's smallest part.

Building a module draws random numbers for weights that are overwritten at once; the host's own stream must not notice.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


@contextlib.contextmanager
def untouched_generators() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's generators (every CUDA device in use too) when the block ends."""
    python, legacy = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)
