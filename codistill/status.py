"""The command `codistill status`: what a run's peers are doing, as a table, in place while watching, or as JSON.

A peer is alive, late, finished, missing or refused: `judge` says which, and why, of what a `Survey` saw. What is shown
comes from strangers: nothing of it is taken for markup, and no character of it can command a terminal. Colours,
wrapping and a spinner are for terminals only; a file or a pipe gets one line a peer, however long.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from codistill.config import ConfigError
from codistill.exchange.errors import ExchangeError, Refused, same_start
from codistill.exchange.membership import HEARTBEAT_SECONDS
from codistill.exchange.signing import KEY, signing_key
from codistill.survey import PATIENCE, Seen, Sight, Survey
from codistill.text import printable

INTERVAL = HEARTBEAT_SECONDS
COLOURS = {"alive": "green", "finished": "cyan", "late": "yellow", "missing": "yellow", "refused": "red"}
COLUMNS = (
    *("peer", "state", "update", "epoch", "behind", "staleness", "bytes"),
    *("dtype", "architecture", "metrics", "incarnation", "why"),
)
_TEXTS = ("state", "dtype", "architecture", "metrics", "why")
_FIRST_TO_GO = ("incarnation", "dtype", "architecture", "epoch", "metrics", "bytes")  # where there is no room
_METRICS = 6  # most metrics in a cell, these before others; the JSON has all
_FIRST = ("loss", "agreement", "alpha", "incidents", "distance")


def run(
    url: str,
    *,
    run_id: str = "default",
    watch: bool = False,
    as_json: bool = False,
    patience: float = PATIENCE,
    interval: float = INTERVAL,
) -> int:
    """Look at a run and print what its peers are doing, once or until interrupted.

    Args:
        url: what the peers were given as --codistill-dir.
        run_id: which run there.
        watch: go on refreshing until interrupted.
        as_json: print one line of JSON at every refresh, see `to_json`.
        patience: seconds without a new heartbeat after which a peer is late.
        interval: seconds between two refreshes.

    Returns:
        The exit status: 0 when the last report found every peer alive or finished, else 1.

    Raises:
        ConfigError: an argument, or the signing key in the environment, that cannot work.
    """
    for name, seconds in (("--patience", patience), ("--interval", interval)):
        if not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"{name} {seconds:g}: must be a finite number of seconds above 0")
    survey = Survey(url, run_id, patience=patience, key=signing_key())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale may be poorer than what is shown
    report: Optional[Report] = None
    try:
        with _spinner() as tell:
            report = look(survey, tell)
        with _display(as_json, watch) as show:
            show(report)
            while watch:
                time.sleep(interval)
                report = look(survey)
                show(report)
    except KeyboardInterrupt:
        pass
    return 0 if report is not None and report.ok else 1


@dataclass(frozen=True)
class Row:
    """One peer. Everything from `update` on is about its newest snapshot, and None while there is none.

    Attributes:
        peer: its number.
        state: "alive", "late", "finished", "missing" or "refused".
        why: what there is to say about the state; "" for nothing.
        cause: of a refusal, the word by which the other peers count it; None otherwise.
        incarnation: which start of the peer wrote last; None while it has not spoken.
        heartbeat: the last one seen; None while it has not spoken.
        update: the host's counter.
        epoch: the host's.
        final: whether the training ended with it.
        behind: updates behind the most advanced peer that is not refused; None for a refused peer.
        staleness: what the peer last said of the snapshots it uses, in updates; None if it did not.
        bytes: size of the weights.
        dtype: in which they travel.
        architecture: registry name of the model, if known.
        metrics: all numbers that the peer added, by name.
    """

    peer: int
    state: str
    why: str = ""
    cause: Optional[str] = None
    incarnation: Optional[int] = None
    heartbeat: Optional[int] = None
    update: Optional[int] = None
    epoch: Optional[int] = None
    final: Optional[bool] = None
    behind: Optional[int] = None
    staleness: Optional[float] = None
    bytes: Optional[int] = None
    dtype: Optional[str] = None
    architecture: Optional[str] = None
    metrics: Optional[Mapping[str, float]] = None


@dataclass(frozen=True)
class Report:
    """A run at one time.

    Attributes:
        place: its URL, without credentials.
        run: its identifier.
        peers: a row for each peer; none when there is an error.
        terms: what run.json says all peers agreed on; None when there is an error.
        verified: whether signatures were checked.
        error: why nothing can be said of the peers, in one line; None when something can.
    """

    place: str
    run: str
    peers: tuple[Row, ...] = ()
    terms: Optional[Mapping[str, Any]] = None
    verified: bool = False
    error: Optional[str] = None

    @property
    def ok(self) -> bool:
        """Whether every peer is alive or finished."""
        return self.error is None and all(row.state in ("alive", "finished") for row in self.peers)


def look(survey: Survey, tell: Callable[[str], None] = lambda line: None) -> Report:
    """Look at a run once, as long as `Survey.look` takes, and judge it."""
    try:
        sight = survey.look(tell)
    except ExchangeError as error:
        return Report(survey.place, survey.run, error=str(error))
    peers = tuple(judge(sight, survey.patience))
    return Report(survey.place, survey.run, peers, sight.terms.everything, verified=survey.verified)


def judge(sight: Sight, patience: float) -> list[Row]:
    """Turn what was seen into rows.

    Args:
        sight: of the run.
        patience: seconds without a new heartbeat after which a peer is late.
    """
    equal = _equal_starts(sight.seen)
    publishes = sight.terms.everything.get("exchange") != "prediction"
    rows = [_row(peer, seen, equal.get(peer), sight.now, patience, publishes) for peer, seen in sight.seen.items()]
    usable = {row.peer: row.update for row in rows if row.update is not None and row.state != "refused"}
    front = max(usable.values(), default=0)
    return [replace(row, behind=front - usable[row.peer]) if row.peer in usable else row for row in rows]


def _row(peer: int, seen: Seen, equal: Optional[Refused], now: float, patience: float, publishes: bool) -> Row:
    refusal = seen.refusal or equal
    state, why = ("refused", str(refusal)) if refusal is not None else _state(seen, now, patience, publishes)
    row = Row(peer, state, why, refusal.cause if refusal is not None else None)
    if seen.latest is None:
        return row
    row = replace(row, incarnation=seen.latest.incarnation, heartbeat=seen.latest.heartbeat)
    manifest = seen.latest.manifest
    if manifest is None:
        return row
    return replace(
        row,
        update=manifest.update,
        epoch=manifest.epoch,
        final=manifest.final,
        staleness=manifest.metrics.get("staleness"),
        bytes=manifest.bytes,
        dtype=manifest.dtype,
        architecture=manifest.architecture["name"] if manifest.architecture else None,
        metrics=manifest.metrics,
    )


def _state(seen: Seen, now: float, patience: float, publishes: bool) -> tuple[str, str]:
    """The state of a peer that nobody refuses, and why; with exchange by prediction nobody `publishes` snapshots."""
    latest, silent = seen.latest, now - seen.since
    if latest is None:
        return "missing", "it has not spoken yet"
    if latest.closed:
        final = not publishes or (latest.manifest is not None and latest.manifest.final)
        return "finished", "" if final else "without a final snapshot: the others will find its last one stale"
    if not seen.beating or silent > patience:
        return "late", f"no heartbeat in {silent:.0f} s"
    return "alive", "" if latest.manifest or not publishes else "it has published no snapshot yet"


def _equal_starts(seen: Mapping[int, Seen]) -> dict[int, Refused]:
    """By peer, the refusal of those that started from the same weights as another."""
    groups: dict[str, list[int]] = {}
    for peer, one in seen.items():
        if one.latest is not None and one.latest.manifest is not None:
            groups.setdefault(one.latest.manifest.init_hash, []).append(peer)
    twins = {peer: group[peer == group[0]] for group in groups.values() if len(group) > 1 for peer in group}
    return {peer: same_start(f"peer {twin}") for peer, twin in twins.items()}


def to_json(report: Report) -> str:
    """One line: the attributes of `Report`, with those of `Row` in `peers`, and `ok`. Every key is always there."""
    return json.dumps({**asdict(report), "ok": report.ok})


def to_text(report: Report) -> str:
    """The title, the table and the summary, without colours, every row on one line."""
    page = io.StringIO()
    Console(file=page, width=10_000, color_system=None, legacy_windows=False).print(_page(report))
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def _page(report: Report, width: Optional[int] = None) -> Any:
    """What a person sees; on a terminal of `width` columns without what has no room, and the reasons on their own."""
    if report.error is not None:
        return Text(printable(report.error))
    names = [name for name in COLUMNS if any(_cell(name, getattr(row, name)) for row in report.peers)]
    table, reasons = _table(report, names), []
    if width is not None:
        names = [name for name in names if name != "why"]
        for name in ("", *_FIRST_TO_GO):
            names = [kept for kept in names if kept != name]
            table = _table(report, names)
            if Console(width=10_000).measure(table).minimum <= width:
                break
        reasons = [Text(printable(f"peer {row.peer} is {row.state}: {row.why}")) for row in report.peers if row.why]
    return Group(Text(_title(report)), Text(), table, Text(), Text(_summary(report)), *reasons)


def _title(report: Report) -> str:
    terms = report.terms or {}
    every = f"every {terms['interval']} updates, " if type(terms.get("interval")) is int else ""
    signed = ""
    if KEY in terms or report.verified:
        signed = ", signatures checked" if report.verified else f", signatures not checked ({KEY} is not set)"
    size = len(report.peers)
    return printable(
        f"run {report.run} in {report.place}: {size} peer{'s' * (size != 1)}, {every}{terms.get('dtype')}{signed}"
    )


def _summary(report: Report) -> str:
    counts = Counter(row.state for row in report.peers)
    return ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state])


def _table(report: Report, names: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = {name: [Text(_cell(name, getattr(row, name))) for row in report.peers] for name in names}
    for state in columns.get("state", ()):
        state.stylize(COLOURS[state.plain])
    for name, cells in columns.items():
        wraps = name == "metrics"
        width = 24 if wraps else max(cell.cell_len for cell in cells)
        table.add_column(name, justify="left" if name in _TEXTS else "right", no_wrap=not wraps, min_width=width)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "bytes":
        return decimal(value)
    if name == "metrics":
        names = [key for key in _FIRST if key in value] + sorted(value.keys() - {*_FIRST, "staleness"})
        return " ".join(f"{printable(key)}={_number(value[key])}" for key in names[:_METRICS])
    return _number(value) if isinstance(value, float) else printable(str(value))


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e12 and value == int(value) else f"{value:.4g}"


@contextmanager
def _spinner() -> Iterator[Callable[[str], None]]:
    """Gives what shows on standard error, if that is a terminal, what is being waited for."""
    if not sys.stderr.isatty():
        yield lambda line: None
        return
    with Console(stderr=True).status("") as spinner:
        yield lambda line: spinner.update(Text(line))


@contextmanager
def _display(as_json: bool, watch: bool) -> Iterator[Callable[[Report], None]]:
    """Gives what shows one report."""
    if as_json:
        yield lambda report: print(to_json(report), flush=True)
    elif watch and sys.stdout.isatty():
        with Live(console=Console(), auto_refresh=False) as live:
            yield lambda report: live.update(_page(report, live.console.width), refresh=True)
    else:
        yield _print


def _print(report: Report) -> None:
    if report.error is not None:
        print(f"codistill: {printable(report.error)}", file=sys.stderr, flush=True)
    elif sys.stdout.isatty():
        console = Console()
        console.print(_page(report, console.width))
    else:
        print(to_text(report), flush=True)
