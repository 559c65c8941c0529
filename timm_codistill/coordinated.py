"""Coordinated sampling: every peer goes through the same batches, with weights and dropout of its own.

Seeded by `--codistill-data-seed`, the epoch and the worker's rank, hence the same for all peers: whatever is drawn
while a batch is made, be it order, augmentation, mixup, cutmix or random erasing, in this process, on its device or in
the loader's own workers. Seeded by the peer's own seed, as always: initial weights, dropout, drop path and all else.

A peer that is behind the others drops batches until it meets them: whole updates, never the first of an epoch, so that
train.py always has something to report. Only exchange by prediction uses any of this.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from typing import Any, Optional

import numpy
import torch

from codistill import ConfigError, Position, untouched_generators

logger = logging.getLogger("codistill")

_END = object()


class Sampling:
    """What one worker draws its batches with, and where in the data it is.

    Attributes:
        position: of the micro-batch handed out last; None when none has been in this epoch.
    """

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        """`seed` is the peers' common one, `rank` this worker's, `device` the one that batches are made on."""
        self.position: Optional[Position] = None
        self._seed, self._rank, self._device = seed, rank, device
        self._epoch, self._group = 1, 1
        self._target: Optional[Position] = None
        self._dropped = 0

    def begin_epoch(self, epoch: int, group: int) -> None:
        """Get ready for `epoch`, from 1; `group` micro-batches make an update."""
        self.position, self._epoch, self._group = None, epoch, group

    def batches(self, loader: Any) -> Any:
        """Something in place of `loader` that yields this epoch's batches as all peers have them.

        Raises:
            ConfigError: the loader's workers outlive an epoch, and with them the state of their generators.
        """
        innermost = loader
        while hasattr(innermost, "loader"):
            innermost = innermost.loader
        if getattr(innermost, "persistent_workers", False):
            raise ConfigError(
                "--codistill-exchange prediction: the workers of the training loader must not outlive an epoch; "
                "give it persistent_workers=False"
            )
        return _Batches(loader, self)

    def mixing(self, mix: Any) -> Any:
        """Something in place of `mix` (timm's Mixup, called for every batch) that draws as all peers do."""
        return _Mixing(mix, self)

    def skip_to(self, target: Optional[Position]) -> None:
        """Go on at `target` when the update at hand is done, or as shortly before it as whole updates allow.

        None leaves things as they are: to come as far as the others were is no mistake, even if they have gone on.
        """
        self._target = target or self._target

    def drawn(self, loader: Any) -> Iterator[Any]:
        """The batches of `loader` in this epoch, less those that are skipped."""
        generators = _Generators(self._device, self._seed, self._epoch, self._rank)
        with generators.in_use():
            batches = iter(loader)
        number = wanted = 0
        self._arrive(number)
        while True:
            with generators.in_use():
                batch = next(batches, _END)
            if batch is _END:
                return
            if number < wanted:
                self._dropped += 1
            else:
                self.position = Position(self._epoch, number)
                yield batch
            number += 1
            if number >= wanted and number % self._group == 0:
                following = self._next_wanted(number)
                if following is None:
                    self._dropped += max(0, len(loader) - number)
                    return
                wanted = following

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Draw for the batch handed out last: the same numbers whether or not batches before it were skipped."""
        batch = self.position.batch if self.position is not None else 0
        return _Generators(self._device, self._seed, self._epoch, self._rank, batch + 1).in_use()

    def _next_wanted(self, number: int) -> Optional[int]:
        """The batch to go on with when the next would be `number`, the first of an update; None: the next epoch's."""
        if self._arrive(number) or self._target is None:
            return number
        return self._target.batch // self._group * self._group if self._target.epoch == self._epoch else None

    def _arrive(self, number: int) -> bool:
        """Whether batch `number`, the first of an update, is where to go on, or it is nowhere; then this is over."""
        target = self._target
        if target is not None and target >= Position(self._epoch, number + self._group):
            return False
        if self._dropped and self._rank == 0:
            logger.info(
                "codistill: skipped %d micro-batches to meet the other peers; going on at epoch %d, batch %d",
                *(self._dropped, self._epoch, number),
            )
        self._target, self._dropped = None, 0
        return True


class _InPlaceOf:
    """Passes on to the host's own object whatever a subclass does not do differently."""

    def __init__(self, host: Any, sampling: Sampling) -> None:
        vars(self).update(_host=host, _sampling=sampling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._host, name, value)


class _Batches(_InPlaceOf):
    def __iter__(self) -> Iterator[Any]:
        return self._sampling.drawn(self._host)

    def __len__(self) -> int:
        return len(self._host)


class _Mixing(_InPlaceOf):
    def __call__(self, *arguments: Any, **kwargs: Any) -> Any:
        with self._sampling.in_use():
            return self._host(*arguments, **kwargs)


class _Generators:
    """States of random generators that stand in for the process's own while a block runs."""

    def __init__(self, device: torch.device, *seed: int) -> None:
        self._device = device
        self._seed = numpy.random.SeedSequence(seed).generate_state(3, numpy.uint64)
        self._states: Optional[tuple[Any, ...]] = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        with untouched_generators():
            self._put()
            yield
            self._states = self._get()

    def _put(self) -> None:
        if self._states is None:
            python, legacy, engine = map(int, self._seed)
            random.seed(python)
            numpy.random.seed(legacy % 2**32)
            torch.default_generator.manual_seed(engine)
            if self._device.type == "cuda":
                torch.cuda.default_generators[self._index()].manual_seed(engine)
            return
        python, legacy, engine, cuda = self._states
        random.setstate(python)
        numpy.random.set_state(legacy)
        torch.set_rng_state(engine)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)

    def _get(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda

    def _index(self) -> int:
        return torch.cuda.current_device() if self._device.index is None else self._device.index
