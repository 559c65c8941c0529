"""What a run reports of its exchange: incidents, counters, distance from initialisation, `metrics.jsonl`.

Every key of `KEYS` is there at every update on every worker, so that hosts that sum or tabulate logs see one shape. A
metrics file that cannot be written is an incident like any other, never the end of a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger("codistill")

INITIAL_WEIGHTS = "codistill-init.safetensors"
METRICS_FILE = "metrics.jsonl"
KEYS = (
    "alpha",  # weight of the penalty at this update
    "loss",  # mean penalty D per counted position, before alpha
    "agreement",  # share of positions where our most likely class is the peers' too
    "peers",  # peers in use
    "staleness",  # own updates since anything new was accepted, the largest over the peers in use
    "gap",  # own update minus the peers' update, the largest over the peers in use
    "distance",  # L2 distance of the trainable parameters from their initial values
    "sent",  # bytes put on the store since the start
    "received",  # bytes of snapshots fetched since the start
    "seconds",  # seconds the training thread gave to the exchange since the start
    "skipped",  # publications skipped because the last one was still under way
    "incidents",  # refusals and faults since the start
)


class ExchangeFailed(RuntimeError):
    """Trouble with the exchange, when the user asked for it to end the run (`--codistill-on-error fail`)."""


class Incidents:
    """Counts what went wrong by cause; tells the log about each cause once; remembers the first for `on_error=fail`.

    Any thread may report; only the training thread asks (`check`).
    """

    def __init__(self, *, fatal: bool) -> None:
        """With `fatal`, the first incident makes `check` raise."""
        self.counts: Counter[str] = Counter()
        self._fatal = fatal
        self._first: Optional[str] = None
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def report(self, cause: str, message: str, *, about: str = "") -> None:
        """Count one incident.

        Args:
            cause: the stable word it is counted by.
            message: one line for the log.
            about: whom it concerns; the log hears of each (cause, about) once.
        """
        with self._lock:
            self.counts[cause] += 1
            self._first = self._first or message
            if f"{cause} {about}" in self._told:
                return
            self._told.add(f"{cause} {about}")
        logger.warning("codistill: %s (%s; counted, and not logged again for the same cause)", message, cause)

    @property
    def total(self) -> int:
        """All incidents so far."""
        return sum(self.counts.values())

    def check(self) -> None:
        """Raise `ExchangeFailed` if there was an incident and the user wants it to end the run."""
        if self._fatal and self._first is not None:
            raise ExchangeFailed(f"{self._first}; ended by --codistill-on-error fail")


class Distance:
    """L2 distance of the trainable parameters from their initial values, which are kept once, on disk.

    The file is mapped, not held in memory. Without it (lost after a resume elsewhere) the distance is NaN.
    """

    def __init__(self, folder: Path, trainable: Iterable[str]) -> None:
        """Look at `folder`'s file of initial weights; `trainable` names the parameters that count."""
        self._path = folder / INITIAL_WEIGHTS
        self._names = sorted(trainable)

    @property
    def known(self) -> bool:
        """Whether there are initial values."""
        return self._path.exists()

    def record(self, state: Mapping[str, Tensor]) -> None:
        """Keep `state` as the initial values; the file appears whole or not at all.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f".{INITIAL_WEIGHTS}.{os.getpid()}")
        try:
            save_file(
                {name: state[name].detach().cpu().float().contiguous().clone() for name in self._names}, unfinished
            )
            os.replace(unfinished, self._path)
        finally:
            unfinished.unlink(missing_ok=True)

    def measure(self, state: Mapping[str, Tensor]) -> float:
        """Distance of `state` (any device, any float dtype), in float32 sums per parameter and float64 overall.

        Raises:
            OSError, SafetensorError: the initial weights cannot be read.
        """
        if not self.known:
            return math.nan
        total = 0.0
        # As numpy arrays: safetensors 0.8 leaks 64 bytes with every tensor that it makes a torch tensor of.
        with safe_open(self._path, framework="np") as initial, torch.no_grad():
            for name in self._names:
                moved = state[name].detach().cpu().float() - torch.from_numpy(initial.get_tensor(name))
                total += float(torch.linalg.vector_norm(moved)) ** 2
        return math.sqrt(total)


class MetricsFile:
    """Appends one JSON line at a time to `metrics.jsonl` in the save dir, from any thread.

    A line may wait for the distance at its update, which is measured in the background; those after it wait behind it.
    """

    def __init__(self, folder: Path, incidents: Incidents) -> None:
        """Nothing is opened until the first line is written; from now on the clock runs that each line tells."""
        self._path = folder / METRICS_FILE
        self._began, self._started = time.monotonic(), round(time.time(), 3)
        self._incidents = incidents
        self._lines: deque[tuple[dict[str, Any], bool]] = deque()  # each with whether it waits
        self._measured = (-1, math.nan)  # the last update of which the distance is known, and that distance
        self._lock = threading.Lock()

    def write(self, record: Mapping[str, Any], *, waits: bool = False) -> None:
        """Append `record`, `wall` and `started`; numbers that are not finite become null.

        `wall` are this process's seconds so far, `started` (seconds since 1970) tells processes apart.

        Args:
            record: values by name; what `measured` was told of its `update` becomes its `distance`.
            waits: if that was nothing yet, append it when `measured` is told of that update, or of a later one.
        """
        line = {**record, "wall": round(time.monotonic() - self._began, 3), "started": self._started}
        with self._lock:
            self._lines.append((line, waits))
            self._append()

    def measured(self, update: int, distance: float) -> None:
        """After `update` updates the weights are this far from their initial values; earlier lines wait no more."""
        with self._lock:
            self._measured = update, distance
            self._append()

    def flush(self) -> None:
        """Append all that wait, without a distance."""
        with self._lock:
            self._append(patient=False)

    def _append(self, *, patient: bool = True) -> None:
        update, distance = self._measured
        while self._lines:
            line, waits = self._lines[0]
            if patient and waits and line["update"] > update:
                return
            self._lines.popleft()
            self._append_line({**line, "distance": distance} if line.get("update") == update else line)

    def _append_line(self, record: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            self._incidents.report("metrics", f"{self._path} could not be written: {error.strerror}")
