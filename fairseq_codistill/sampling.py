"""Exchange by prediction: all peers go through the same micro-batches in the same order, each knowing where it is.

The data seed alone seeds both generators of fairseq's training iterator, the one that composes batches and the one that
shuffles them. Batches that fairseq keeps over all epochs are composed as in epoch 1, whichever a process started with.
`--seed` goes on to seed what is the peer's own: initial weights, dropout, and what a data set draws by itself as items
are loaded (noise, `--shorten-method random_crop`); batches that differ for that are found unequal and get no penalty.
The validation set is left alone. Skipped data is not loaded; should this process be all there is, nothing is skipped.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Optional

from fairseq.data import iterators

from codistill import ConfigError, Position

_log = logging.getLogger(__name__)
_GroupedIterator = iterators.GroupedIterator
_DATA = "codistill_data"  # attribute of an epoch's iterator: whose it is


class TrainingData:
    """The training set of `task` in the order that all peers share, and the place of this worker in it.

    Args:
        task: its `get_batch_iterator` is wrapped on the instance.
        root: fairseq's whole configuration.
    """

    def __init__(self, task: Any, root: Any) -> None:
        """Take the place of the method on `task`, and of the class that groups micro-batches by update."""
        self._task, self._root = task, root
        self._seed = int(getattr(task.cfg, "codistill_data_seed", 0))
        self._host_iterator = task.get_batch_iterator
        self._batches: Any = None  # fairseq's iterator over epochs
        self._fixed = False  # batches stay with their worker: --fix-batches-to-gpus
        self._updates: Optional[_Updates] = None  # of the epoch at hand
        self._target: Optional[Position] = None
        self._skipped = 0  # micro-batches, on the way to the target
        task.get_batch_iterator = self._get_batch_iterator
        iterators.GroupedIterator = _grouped

    def next_position(self) -> Position:
        """Where the micro-batch lies that is computed next; to be asked once for each, retries included.

        A target that was not yet reached is forgotten as an update begins: who still wants it says so again.

        Raises:
            ConfigError: the loop is not fairseq-train's.
        """
        if self._updates is None:
            raise ConfigError("--codistill-exchange prediction: needs the training loop of fairseq-train; use that")
        if self._updates.fresh:
            self._target = None
        return Position(self._batches.epoch, self._updates.next_batch())

    def go_on_at(self, target: Position) -> None:
        """Skip data so that after the update at hand comes the one that holds `target`, or the first one beyond."""
        self._target = target
        self._skip(keep=0)

    def _get_batch_iterator(self, dataset: Any, **given: Any) -> Any:
        if dataset is not self._task.datasets.get(self._root.dataset.train_subset):
            return self._host_iterator(dataset, **given)
        compose, shuffle = self._seeds(dataset, given)
        batches = self._host_iterator(dataset, **{**given, "seed": compose})
        if not isinstance(batches, iterators.EpochBatchIterator):
            raise SystemExit(
                f"--codistill-exchange prediction: task {type(self._task).__name__} streams its training data, which "
                "peers cannot go through in step; use --codistill-exchange checkpoint"
            )
        batches.seed = shuffle
        batches.next_epoch_itr = self._epochs_of(batches)
        return batches

    def _seeds(self, dataset: Any, given: Mapping[str, Any]) -> tuple[int, int]:
        """What fairseq must be given to compose batches, and to shuffle them; it adds the epoch to both."""
        epoch = given.get("epoch", 1)
        anew = (
            given.get("update_epoch_batch_itr", False)
            or given.get("disable_iterator_cache", False)
            or getattr(self._task.cfg, "rebuild_batches", False)
            or not self._task.can_reuse_epoch_itr(dataset)
        )
        composed = epoch if anew else 1
        by_epoch = composed if self._root.dataset.update_ordered_indices_seed else 0
        shuffle = self._seed + by_epoch
        return shuffle + composed - epoch, shuffle

    def _epochs_of(self, batches: Any) -> Callable[..., Any]:
        """What gives the epochs of `batches`, marked as ours."""
        host_epoch = type(batches).next_epoch_itr

        def next_epoch_itr(*positional: Any, **how: Any) -> Any:
            self._batches, self._fixed = batches, how.get("fix_batches_to_gpus", False)
            found = host_epoch(batches, *positional, **how)
            setattr(found, _DATA, self)
            return found

        return next_epoch_itr

    def _group(self, micro_batches: Any, size: int, skip_remainder: bool) -> _Updates:
        """The epoch's updates; at least one is left, since fairseq cannot do with an epoch that has none."""
        self._updates = _Updates(micro_batches, size, skip_remainder)
        self._skip(keep=1)
        return self._updates

    def _skip(self, keep: int) -> None:
        """Go on towards the target, as far as it is in this epoch, leaving `keep` of the epoch's updates."""
        updates, target = self._updates, self._target
        if updates is None or target is None:
            return
        epoch, left = self._batches.epoch, updates.total - updates.n
        here = Position(epoch, updates.ahead)
        beyond = target >= Position(epoch, len(self._batches))
        skipped = min(left - keep, left if beyond else (target.batch - here.batch) // updates.chunk_size)
        if target > here and skipped == left > 0:
            self._end_epoch(updates)
        elif target > here and skipped > 0:
            self._restart_epoch(updates, here.batch + skipped * updates.chunk_size)
        self._skipped += updates.ahead - here.batch
        if target.epoch <= epoch:
            self._arrive(target)

    def _arrive(self, target: Position) -> None:
        self._target = None
        if self._skipped:
            message = "skipped %d micro-batches, to meet the other peers from epoch %d, micro-batch %d on"
            _log.info(message, self._skipped, target.epoch, target.batch)
        self._skipped = 0

    def _restart_epoch(self, updates: _Updates, batch: int) -> None:
        """Go on with micro-batch `batch`, with a loader of its own: as fairseq does when it resumes there."""
        end_loaders()
        batches = self._batches
        batches.dataloader = None
        batches._cur_epoch_itr = batches._get_iterator_for_epoch(
            batches.epoch, batches.shuffle, fix_batches_to_gpus=self._fixed, offset=batch
        )
        updates.restart(batches._cur_epoch_itr)

    def _end_epoch(self, updates: _Updates) -> None:
        """Leave nothing of the epoch."""
        end_loaders()
        source = self._batches._cur_epoch_itr
        source.n, updates.n, updates.ahead = source.total, updates.total, source.total


class _Updates(_GroupedIterator):  # type: ignore[misc, valid-type]
    """fairseq's iterator over the micro-batches of each update, counting where in the epoch they lie.

    Attributes:
        ahead: micro-batches of the epoch before the next update's.
    """

    def __init__(self, micro_batches: Any, size: int, skip_remainder: bool) -> None:
        """Group `micro_batches`, some of which may be done, by `size`."""
        self._skip_remainder = skip_remainder
        self._size = size
        self._begun, self._length, self._asked = 0, 1, 0  # of the update at hand: its place, its size, what it took
        self.restart(micro_batches)

    def restart(self, micro_batches: Any) -> None:
        """Go on with `micro_batches` in the place of the ones before."""
        self.ahead = micro_batches.n
        super().__init__(micro_batches, self._size, self._skip_remainder)

    def __next__(self) -> Any:
        chunk = super().__next__()
        self._begun, self._length, self._asked = self.ahead, len(chunk), 0
        self.ahead += len(chunk)
        return chunk

    @property
    def fresh(self) -> bool:
        """Whether nothing of the update at hand was computed."""
        return self._asked == 0

    def next_batch(self) -> int:
        """Micro-batches of the epoch before the one that is computed next; after the update's last its first."""
        found = self._begun + self._asked % self._length
        self._asked += 1
        return found


def _grouped(iterable: Any, chunk_size: int, skip_remainder_batch: bool = False) -> Any:
    """Stand in the place of fairseq's GroupedIterator; what is not a training set's epoch gets that."""
    data: Optional[TrainingData] = getattr(iterable, _DATA, None)
    if data is None:
        return _GroupedIterator(iterable, chunk_size, skip_remainder_batch)
    return data._group(iterable, chunk_size, skip_remainder_batch)


def end_loaders() -> None:
    """End fairseq's loader threads, which else make Python abort when it ends in the middle of an epoch."""
    for thread in threading.enumerate():
        if isinstance(thread, iterators.BackgroundConsumer):
            thread._max_len = 0  # no more than what it waits to hand over
            for _ in range(100):
                with contextlib.suppress(queue.Empty):
                    thread._queue.get(timeout=0.01)
                if not thread.is_alive():
                    break
