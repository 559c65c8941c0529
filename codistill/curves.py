"""What trainings wrote of themselves, as points to draw: our metrics.jsonl, fairseq's log, timm's summary.csv.

Nothing is written, and neither torch nor a host framework is loaded. A run may be under way, killed within a line, or
resumed: only whole lines count, a line that cannot be read is passed over, where the updates go back what was written
from there on before is forgotten, and what a process counts goes on from where the one before it ended.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import numpy

Against = Literal["updates", "epochs", "time"]
Point = tuple[float, float]

METRICS_FILE = "metrics.jsonl"  # as in codistill.meters, which loads torch
SUMMARY_FILE = "summary.csv"
IN_HOSTS_LOGS = "train_codistill_"  # what our keys begin with there
_COUNTERS = frozenset(  # of one process; those of the next one go on from there
    ("wall", "train_wall", "sent", "received", "seconds", "skipped", "incidents")
)
_STARTED = "started"  # of metrics: when the process was
_JSON = re.compile(r'(\{"epoch": .*\})\s*$')
_DURING = re.compile(r"\bepoch (\d+):\s+(\d+) / (\d+) (\w+=.*)$")  # --log-format simple
_AT_END = re.compile(r"\bepoch (\d+) \| (?:valid on '(.+?)' subset \| )?(\w+ [^|]+(?: \| \w+ [^|]+)*)$")


class NoCurve(Exception):
    """A run that has not what was asked for; says what it has."""


class Row(NamedTuple):
    """One line of a file.

    Attributes:
        table: lines of one table have the same keys: "metrics", "summary", "inner" (fairseq, within an epoch), "train"
            (fairseq, means of an epoch), or the name of a validation set.
        at: updates done; in a summary epochs done.
        values: numbers by key; not finite where the run had none.
        epochs: epochs done, with a fraction; of metrics the epoch under way, from 1; None: the line does not say.
    """

    table: str
    at: float
    values: Mapping[str, float]
    epochs: Optional[float] = None


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: its save dir, or one file.
        rows: what it wrote, each file in its order.
    """

    path: Path
    rows: Sequence[Row]

    @property
    def keys(self) -> list[str]:
        """What can be drawn of it; our own keys by their short names."""
        found = {key for row in self.rows for key in row.values}
        return sorted({key if key == IN_HOSTS_LOGS + "loss" else key.removeprefix(IN_HOSTS_LOGS) for key in found})

    def curve(self, key: str, against: Against = "updates") -> list[Point]:
        """The (x, y) of a key, oldest first; y may be other than finite.

        Our own keys come from metrics.jsonl, or else from the host's log. Within an epoch fairseq's log is finer than
        at its end, and preferred.

        Raises:
            NoCurve: the run does not have the key, or cannot tell its x.
        """
        name, rows = key, self._with(key)
        if not rows and key != "loss":  # which is there in other units
            name = IN_HOSTS_LOGS + key
            rows = self._with(name)
        if not rows:
            raise NoCurve(f"{self.path} has no {key}; it has {', '.join(self.keys)}")
        points = dict(sorted({row.at: row.values[name] for row in rows}.items()))
        try:
            x = self._converted(list(points), "epochs" if rows[0].table == "summary" else "updates", against)
        except NoCurve as error:
            raise NoCurve(f"{self.path} cannot show {key} against {against}: {error}") from None
        return list(zip(x, points.values(), strict=True))

    def _with(self, key: str) -> list[Row]:
        """The rows of the first table that has the key."""
        found = [row for row in self.rows if key in row.values]
        tables = sorted({row.table for row in found}, key=lambda table: (table != "metrics", table != "inner", table))
        return [row for row in found if row.table == tables[0]]

    def _converted(self, x: Sequence[float], own: str, against: Against) -> list[float]:
        if own == against:
            return list(x)
        if own == "epochs":
            updates = _along(x, [(epochs, update) for update, epochs in self._epochs()])
            return updates if against == "updates" else _along(updates, self._times())
        return _along(x, self._epochs() if against == "epochs" else self._times())

    def _epochs(self) -> list[Point]:
        """(updates done, epochs done), from the log within epochs, or at their ends, or from how epochs went by."""
        for table in ("inner", "train"):
            known = {row.at: row.epochs for row in self.rows if row.table == table and row.epochs and row.at > 0}
            if known:
                return sorted(known.items())
        return [(self._epoch_length(), 1.0)]

    def _epoch_length(self) -> float:
        """Updates in an epoch, as metrics.jsonl bounds them: exact when training ended with an epoch.

        After u updates epoch e is under way, so that the length is between u / e and u / (e - 1).
        """
        seen = [(row.at, row.epochs) for row in self.rows if row.table == "metrics" and row.epochs and row.at > 0]
        one_is_over = any(epochs > 1 for _, epochs in seen) or any(row.table == "summary" for row in self.rows)
        if not seen or not one_is_over:
            raise NoCurve(
                f"the updates of an epoch can be told by a fairseq log, or a {METRICS_FILE} of more than one epoch"
            )
        return math.ceil(max(at / epochs for at, epochs in seen))

    def _times(self) -> list[Point]:
        """(updates done, seconds), by the clock of metrics.jsonl, or else of fairseq's log."""
        for clock in ("wall", "train_wall"):
            rows = [row for row in self._with(clock) if math.isfinite(row.values[clock]) and row.at > 0]
            known = {row.at: row.values[clock] for row in rows}
            timed = max((row.at for row in self.rows if row.table in ("inner", "train")), default=0.0)
            if known and clock == "train_wall" and max(known) < timed:
                raise NoCurve(f"fairseq's clock stands still at update {max(known):g}, after a resume within an epoch")
            if known:
                return sorted(known.items())
        raise NoCurve(f"the time can be told by a fairseq log, or a {METRICS_FILE} with the key wall")


def read(path: Path) -> Run:
    """Read a run.

    Args:
        path: a save dir with metrics.jsonl, summary.csv or fairseq logs (`*.log`, the oldest first), or one such file.

    Raises:
        NoCurve: there is nothing of the kind, or it cannot be read.
    """
    try:
        files = _files(path) if path.is_dir() else [path]
        rows = [row for kind in _by_kind(files) for row in _joined(kind)]
    except OSError as error:
        raise NoCurve(f"{path} cannot be read: {error.strerror}") from None
    if not rows:
        raise NoCurve(f"{path} is not a run: no numbers in a {METRICS_FILE}, a {SUMMARY_FILE} or a fairseq log (*.log)")
    return Run(path, rows)


def _files(folder: Path) -> list[Path]:
    logs = [log for log in folder.glob("*.log") if log.is_file()]
    logs.sort(key=lambda log: (log.stat().st_mtime, log.name))
    return [file for file in (folder / METRICS_FILE, folder / SUMMARY_FILE) if file.is_file()] + logs


def _by_kind(files: Sequence[Path]) -> Iterator[Iterable[Row]]:
    readers = {METRICS_FILE: _metrics, SUMMARY_FILE: _summary}
    logs: dict[str, list[Row]] = {}
    for file in files:
        if file.name in readers:
            yield readers[file.name](_lines(file))
        elif found := list(_log(_lines(file))):
            logs[file.name] = found
    if sum(rows[0].at <= next(iter(logs.values()))[0].at for rows in logs.values()) > 1:
        raise NoCurve(f"{files[0].parent} has several logs from the start ({', '.join(logs)}); name one of them")
    yield (row for rows in logs.values() for row in rows)


def _lines(path: Path) -> Iterator[str]:
    """The whole lines: the last one counts when its end is there."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        yield from (line.rstrip("\r\n") for line in file if line.endswith("\n"))


def _joined(rows: Iterable[Row]) -> list[Row]:
    """One history out of what several processes appended, one after the other."""
    kept: list[Row] = []
    before: dict[str, float] = {}  # what the processes that have ended had counted
    last: dict[str, float] = {}  # what the present one has
    present: Optional[float] = None  # when it was started, where that is known
    for row in rows:
        started = row.values.get(_STARTED, present)
        now = {key: value for key, value in row.values.items() if _counts(key) and math.isfinite(value)}
        back = bool(kept) and row.at < kept[-1].at
        if back or started != present or any(value < last.get(key, value) for key, value in now.items()):
            before.update({key: before.get(key, 0.0) + value for key, value in last.items()})
            last.clear()
        if back:
            kept = [other for other in kept if other.at < row.at]
        last.update(now)
        present = started
        values = {**row.values, **{key: before.get(key, 0.0) + now[key] for key in now}}
        values.pop(_STARTED, None)
        kept.append(row._replace(values=values))
    return kept


def _counts(key: str) -> bool:
    return key.removeprefix(IN_HOSTS_LOGS) in _COUNTERS


def _metrics(lines: Iterable[str]) -> Iterator[Row]:
    for entry in map(_object, lines):
        at, epoch = _number(entry.pop("update", None)), _number(entry.pop("epoch", None))
        if at is not None:
            yield Row("metrics", at, _numbers(entry), epoch)


def _summary(lines: Iterable[str]) -> Iterator[Row]:
    """A resumed training writes the header again, perhaps another one."""
    header: list[str] = []
    for line in lines:
        try:
            cells = next(csv.reader([line]), [])
        except csv.Error:
            continue
        if cells[:1] == ["epoch"]:
            header = [re.sub("^eval_", "valid_", name) for name in cells[1:]]
            continue
        epoch = _number(cells[0]) if len(cells) == len(header) + 1 else None
        if header and epoch is not None:
            yield Row("summary", epoch + 1, _numbers(dict(zip(header, cells[1:], strict=True))))


def _log(lines: Iterable[str]) -> Iterator[Row]:
    for line in lines:
        entry = _json_entry(line) or _simple_entry(line)
        if entry is None:
            continue
        if entry.values.get("train_wall") == 0:  # fairseq 0.12 knows no time after a resume within an epoch
            entry = entry._replace(values={key: value for key, value in entry.values.items() if key != "train_wall"})
        yield entry


def _json_entry(line: str) -> Optional[Row]:
    """`--log-format json`: within an epoch keys are bare, and `update` has the epochs done; else they have a prefix."""
    found = _JSON.search(line)
    entry = _object(found[1]) if found else {}
    counter = next((key for key in entry if key.endswith("num_updates")), "")
    at, epoch, fraction = (_number(entry.pop(key, None)) for key in (counter, "epoch", "update"))
    if at is None:
        return None
    if counter == "num_updates":
        return Row("inner", at, {f"train_{key}": value for key, value in _numbers(entry).items()}, fraction)
    table = counter.removesuffix("_num_updates")
    return Row(table, at, _numbers(entry), epoch if table == "train" else None)


def _simple_entry(line: str) -> Optional[Row]:
    """`--log-format simple`, and what tqdm's leaves in a file."""
    if during := _DURING.search(line):
        values = dict(item.partition("=")[::2] for item in during[4].split(", "))
        table, prefix = "inner", "train"
        epochs: Optional[float] = int(during[1]) - 1 + int(during[2]) / max(1, int(during[3]))
    elif at_end := _AT_END.search(line):
        values = dict(item.partition(" ")[::2] for item in at_end[3].split(" | "))
        table = prefix = at_end[2] or "train"
        epochs = None if at_end[2] else int(at_end[1])
    else:
        return None
    at = _number(values.pop("num_updates", None))
    if at is None:
        return None
    return Row(table, at, {f"{prefix}_{key}": value for key, value in _numbers(values).items()}, epochs)


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """What of an entry is a number; null is how metrics.jsonl has one that is not finite."""
    values = {key: math.nan if value is None else _number(value) for key, value in entry.items()}
    return {key: value for key, value in values.items() if value is not None}


def _number(value: Any) -> Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _along(x: Sequence[float], known: Sequence[Point]) -> list[float]:
    """`x` carried over: on straight lines from (0, 0) through the known points, beyond the last one in proportion."""
    before, after = zip((0.0, 0.0), *known, strict=True)
    within = numpy.interp(x, before, after)
    beyond = numpy.asarray(x) * (after[-1] / before[-1])
    found: list[float] = numpy.where(numpy.asarray(x) > before[-1], beyond, within).tolist()
    return found
