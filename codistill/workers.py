"""The data-parallel workers of this peer, and their meetings.

A peer of several workers gets a gloo group of its own, so that nothing here ever enters the host's process group. Its
collectives carry a few integers and run on the training thread only. One worker needs no group, and makes none.

When a collective fails (a worker died, a time-out) gloo's group is unusable: `WorkersLost` says so, and the caller
stops exchanging; training itself is the host's business.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from codistill.config import ConfigError
from codistill.text import first_line


class WorkersLost(RuntimeError):
    """A collective among this peer's workers failed; the group cannot be used again."""


class Workers:
    """This process among the workers of its peer.

    Attributes:
        rank: this worker, from 0.
        size: number of workers.
        fetcher: rank of the worker that reads snapshots for every worker on this machine.
    """

    def __init__(self, timeout: float) -> None:
        """Join the peer's own gloo group (every worker must do so).

        Args:
            timeout: seconds a collective may take before it counts as failed.

        Raises:
            WorkersLost: a worker did not come.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1
        self._group: Any = None
        if several:
            self._group = self._run(lambda: dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))
        try:
            self.fetcher = self._first_on_this_machine()
        except WorkersLost:
            self.close()  # for those who still wait for us
            raise

    @property
    def first(self) -> bool:
        """Whether this is worker 0, which speaks for the peer."""
        return self.rank == 0

    @property
    def fetches(self) -> bool:
        """Whether this worker reads snapshots for its machine."""
        return self.rank == self.fetcher

    def share(self, values: Sequence[int]) -> list[int]:
        """Worker 0's `values` (signed 64 bit, the same number on every worker)."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.int64)
        self._run(lambda: dist.broadcast(tensor, src=0, group=self._group))
        return tensor.tolist()

    def minimum(self, values: Sequence[int]) -> list[int]:
        """Element-wise minimum of all workers' `values`."""
        if self._group is None or not values:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.int64)
        self._run(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._group))
        return tensor.tolist()

    def together(self, action: Callable[[], None]) -> None:
        """Do it on every worker; when one of them fails, all do.

        Raises:
            ConfigError: another worker failed; what this one raised comes as it is.
            WorkersLost: a worker did not come.
        """
        refusal: Optional[Exception] = None
        try:
            action()
        except Exception as error:
            refusal = error
        [fine] = self.minimum([refusal is None])
        if not fine:
            raise refusal or ConfigError("another worker of this peer could not join the run; its message says why")

    def close(self) -> None:
        """Leave the group, on one's own: a worker that waits for this one learns of it now, not after the time-out."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(Exception):  # the host may have taken down all groups already
                dist.destroy_process_group(group)

    def _run(self, collective: Callable[[], Any]) -> Any:
        try:
            return collective()
        except RuntimeError as error:
            raise WorkersLost(f"the workers of this peer could not meet: {first_line(error)}") from error

    def _first_on_this_machine(self) -> int:
        if self._group is None:
            return 0
        mine = torch.tensor(_machine(), dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        self._run(lambda: dist.all_gather(everyone, mine, group=self._group))
        return next(rank for rank, other in enumerate(everyone) if torch.equal(other, mine))


def _machine() -> list[int]:
    """What workers that share a temporary folder, and no others, have in common.

    Host names repeat in container images; the kernel's boot id and the folder's inode do not.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = int(boot_id.read_text().strip().replace("-", "")[:15], 16) if boot_id.exists() else 0
    folder = os.stat(tempfile.gettempdir())
    return [boot, folder.st_dev & (2**62 - 1), folder.st_ino & (2**62 - 1)]
