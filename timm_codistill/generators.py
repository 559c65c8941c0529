"""The random generators of all workers, as plain types, for checkpoints of a synchronous run.

timm's checkpoints do not hold them. With them, and with `--workers 0`, a restart draws the numbers that the run would
have drawn had it not been stopped. They travel in a group of our own, among the workers of this peer only.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Optional

import numpy
import torch
import torch.distributed as dist


class Generators:
    """Collects the generators' states on worker 0, which writes checkpoints, and puts them back on every worker."""

    def __init__(self, device: torch.device) -> None:
        """`device` is the one that the run draws on besides the CPU."""
        self._device = device
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if self._several else None

    def collect(self) -> Optional[list[dict[str, Any]]]:
        """The states of all workers by rank; None except on worker 0. Every worker must call it."""
        mine = _capture(self._device)
        if not self._several:
            return [mine]
        everyone: Optional[list[Any]] = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone, dst=0, group=self._group)
        return everyone

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Put back what `collect` gave; nothing happens when the number of workers has changed."""
        if len(states) == (dist.get_world_size() if self._several else 1):
            _restore(states[dist.get_rank() if self._several else 0], self._device)


def _capture(device: torch.device) -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = numpy.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.type == "cuda" else None,
    }


def _restore(state: Mapping[str, Any], device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
