"""A SIGTERM to a whole job must not take the training's data away before it has come to the end of its update.

Slurm sends it to every process of a job. torch's DataLoader loses its processes by that, and the training fails instead
of publishing its last weights. With `spare_loaders` they outlive any SIGTERM but their parent's; they end with their
parent, as ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

from torch.utils.data._utils import worker

WATCH_SECONDS = 5.0  # how often torch's own loop looks, too; it takes a fork server for the parent
_host_loop = worker._worker_loop  # torch's own, in every process: it is replaced only after this was imported


def spare_loaders() -> None:
    """From now on the processes of every DataLoader of this one outlive a SIGTERM that others send them.

    A `Codistiller` calls it; call it yourself where loading begins before there is one. Again it changes nothing.
    """
    worker._worker_loop = _loop


def _loop(*args: Any, **kwargs: Any) -> None:
    """What a DataLoader's process runs; torch's own handler would die by a SIGTERM that is not the parent's."""
    parent = multiprocessing.parent_process()  # not getppid(), which may be a fork server
    if parent is not None and hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _host_loop(*args, **kwargs)


def _end_with(parent: Any) -> None:
    while parent.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, WATCH_SECONDS)
        if told is not None and told.si_pid == parent.pid:
            break
    os._exit(0)
