"""Every fault at every step, met by real peers: `python -m tests.faults.matrix`, which is `make faults`.

Two peers train until each uses the other's snapshot; then one of them meets the fault; then both train until each has
taken up something that was published after it, and a few updates more. A killed peer is started again by the same
command. A row's outcome is read off what the peers wrote down.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.faults import KINDS, PUBLISHING
from tests.faults.tiny_peer import PeerProcesses, Plan, Starter, wait_for
from tests.fixtures_store import S3Server

SECONDS = 40.0  # until a peer that has not recovered gives up
AT_ONCE = 2
KEEP = 3  # snapshots that each peer leaves
LOST = 1  # of which nobody can know any more, after a write or a delete that was acknowledged and lost


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        point: where the fault is.
        kind: what it is.
        store: "folder" or "s3".
        workers: of the peer that meets it; the other peer has one.
        rank: of the worker that meets it.
        apart: its workers are on machines of their own.
        joining: the fault is met while the peer joins the run, which the other has begun.
    """

    point: str
    kind: str
    store: str
    workers: int = 1
    rank: int = 0
    apart: bool = False
    joining: bool = False

    @property
    def side(self) -> str:
        return "writer" if self.point in PUBLISHING else "reader"

    @property
    def where(self) -> str:
        worker = f", worker {self.rank} of {self.workers}" if self.workers > 1 else ""
        return f"{self.side}{worker}{', joining' if self.joining else ''}"

    @property
    def sync(self) -> bool:
        """Without sync, manifests are read after a restart only, and by workers of other machines."""
        return self.point.startswith("manifest") and self.workers == 1

    @property
    def times(self) -> int:
        """Often enough for a reader to see it: heartbeats overwrite a latest.json more often than it is read."""
        return 5 if self.point == "latest put" and self.kind in ("truncate", "flip", "stale") else 1

    @property
    def recovers(self) -> bool:
        """Workers that have lost each other exchange nothing any more."""
        return (self.point, self.kind) != ("meeting", "fail")

    @property
    def alone(self) -> bool:
        """Workers that lose each other before any peer was taken up train on alone."""
        return self.joining and not self.recovers

    def __str__(self) -> str:
        return f"{self.point} {self.kind}, {self.where}, {self.store}"


def rows() -> list[Row]:
    """The whole matrix."""
    found = []
    for store in ("folder", "s3"):
        for point, kinds in KINDS.items():
            for kind in kinds:
                if point != "meeting":
                    found.append(Row(point, kind, store, joining=point == "claim"))
                found += [row for row in _of_two_workers(point, kind, store) if store == "folder" or row.apart]
    return found


def _of_two_workers(point: str, kind: str, store: str) -> list[Row]:
    if point in ("copy", "payload put"):
        return [Row(point, kind, store, 2)] if kind in ("fail", "stall", "kill") else []
    if point in PUBLISHING:
        return []
    if point in ("meeting", "map", "swap"):
        joining = (False, True) if (point, kind) == ("meeting", "fail") else (False,)
        return [Row(point, kind, store, 2, rank, joining=early) for early in joining for rank in (0, 1)]
    return [Row(point, kind, store, 2, 1, apart=True)]


@dataclass
class Outcome:
    """What became of a row.

    Attributes:
        row: the case.
        checks: what has to be true, by name.
        text: it in words.
        causes: incidents of both peers, by cause.
        longest: seconds of the longest update of the peer that met the fault, the first apart.
        seconds: it took.
        trouble: output of the peers, if a check failed.
    """

    row: Row
    checks: dict[str, bool]
    text: str
    causes: dict[str, int] = field(default_factory=dict)
    longest: float = 0.0
    seconds: float = 0.0
    trouble: str = ""

    @property
    def good(self) -> bool:
        return all(self.checks.values())


class Places:
    """Where peers leave their snapshots: a folder of the case's own, or a new bucket of one S3 server."""

    def __init__(self, server: S3Server) -> None:
        self._server = server

    def options(self, store: str, folder: Path) -> tuple[str, dict[str, str]]:
        """The dir for the peers, and the environment with which they reach it."""
        if store == "folder":
            return str(folder / "store"), {}
        return f"s3://{self._server.bucket()}/run", self._server.environment()

    def payloads(self, url: str) -> list[str]:
        """Every payload on the store."""
        if "://" not in url:
            return [str(path) for path in Path(url).rglob("*.safetensors*")]
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        page = self._server.client().list_objects_v2(Bucket=bucket, Prefix=prefix)
        return [found["Key"] for found in page.get("Contents", ()) if ".safetensors" in found["Key"]]


def run(row: Row, places: Places, starter: Starter, folder: Path) -> Outcome:
    """Let two peers meet the fault of `row`, below `folder`."""
    began = time.monotonic()
    peers = [PeerProcesses(starter, plan) for plan in _plans(row, places, folder)]
    faulted, other = peers
    other.start()
    if row.joining:
        wait_for(lambda: len(other.records()) > 1, SECONDS)
    faulted.start()
    wait_for(lambda: _tended(row, peers), 2 * SECONDS + 10)
    for peer in peers:
        peer.kill()
    outcome = _judge(row, faulted, other, places.payloads(faulted.plan.options["dir"]))
    outcome.seconds = time.monotonic() - began
    return outcome


def _plans(row: Row, places: Places, folder: Path) -> Iterator[Plan]:
    """The peer that meets the fault, then the other."""
    url, environment = places.options(row.store, folder)
    together = folder / "together"
    together.mkdir(parents=True)
    options = {
        "dir": url,
        "run_id": "run",
        "interval": 2,
        "max_staleness": 10_000,  # an update takes milliseconds here, and what is waited for as long as elsewhere
        "timeout": 3.0,
        "sync": row.sync,
        "keep": KEEP,
    }
    slow = row.store == "s3"  # its server has one core, which it shares
    logs = [str(folder / "peer0" / f"faults-{rank}") for rank in range(row.workers)]
    for peer in (0, 1):
        faulted = peer == 0
        yield Plan(
            folder=str(folder / f"peer{peer}"),
            together=str(together),
            options={**options, "peer": peer},
            seed=peer,
            faults=[{"point": row.point, "kind": row.kind, "nth": 2, "times": row.times}] if faulted else [],
            fault_rank=row.rank,
            begin="start" if row.joining else "use",
            logs=logs,
            until="recovered",
            recovers=row.recovers,
            fires=row.times,
            seconds=SECONDS,
            workers=row.workers if faulted else 1,
            apart=row.apart,
            poll=0.05 if slow else 0.02,
            heartbeat=0.3 if slow else 0.05,
            env=environment,
        )


def _tended(row: Row, peers: Sequence[PeerProcesses]) -> bool:
    """Whether all have ended, or one has died of something else; a killed peer is started again, once."""
    for peer in peers:
        peer.tend()
    faulted = peers[0]
    if row.kind == "kill" and faulted.starts == 1 and not faulted.running() and faulted.fired():
        faulted.start()
    died = any(not peer.running() and not peer.ended() for peer in peers)
    return died or not any(peer.running() for peer in peers)


def _judge(row: Row, faulted: PeerProcesses, other: PeerProcesses, payloads: Sequence[str]) -> Outcome:
    fired = faulted.fired()
    ends = [peer.end(rank) for peer in (faulted, other) if peer.ended() for rank in range(peer.plan.workers)]
    finished = len(ends) == faulted.plan.workers + 1
    victim, rank = (other, 0) if row.side == "writer" else (faulted, row.rank)
    updates = [line for line in victim.records(rank) if "update" in line]
    checks = {
        "fired": bool(fired),
        "finished": finished,
        "recovered": all(peer.end()["reached"] for peer in (faulted, other) if peer.ended()),
        "finite": all(end["finite"] for end in ends) and all(math.isfinite(line["loss"]) for line in updates),
        "good peer at the fault": row.joining or (bool(fired) and _penalised(updates, before=fired[0]["time"])),
        "penalty on at the end": row.alone or (bool(updates) and updates[-1]["penalty"] is not None),
        "resumed": row.kind != "kill" or row.joining or _resumed(faulted) > 0,
        "store tidy": row.sync or len(payloads) <= 2 * KEEP + LOST,
        "nothing left behind": not any(end["left"] for end in ends) and not _remains(faulted, other),
    }
    outcome = Outcome(row, checks, "", _sum(faulted.causes(), other.causes()))
    outcome.longest = max((end["slowest"] for end in ends[: row.workers]), default=0.0)
    outcome.text = _in_words(row, outcome, updates, fired, ends, _resumed(faulted))
    if not outcome.good:
        outcome.trouble = "\n".join(peer.output() for peer in (faulted, other))
    return outcome


def _penalised(updates: Sequence[Mapping[str, Any]], before: float) -> bool:
    """Whether a peer was in use when the fault fired."""
    return any(line["penalty"] is not None for line in updates if line["time"] < before)


def _resumed(peer: PeerProcesses) -> int:
    """The update from which the last start went on."""
    return ([line["start"] for line in peer.records() if "start" in line] or [0])[-1]


def _remains(*peers: PeerProcesses) -> list[Path]:
    """What peers that ended left on their machines."""
    return [
        path for peer in peers for machine in Path(peer.plan.folder).glob("machine-*") for path in machine.iterdir()
    ]


def _sum(*counts: Mapping[str, int]) -> dict[str, int]:
    return {cause: sum(one.get(cause, 0) for one in counts) for cause in sorted({c for one in counts for c in one})}


def _in_words(
    row: Row,
    outcome: Outcome,
    updates: Sequence[Mapping[str, Any]],
    fired: Sequence[Mapping[str, Any]],
    ends: Sequence[Mapping[str, Any]],
    resumed: int,
) -> str:
    wrong = [name for name, good in outcome.checks.items() if not good]
    if wrong:
        return "NOT " + ", not ".join(wrong)
    words = [f"killed, resumed from update {resumed}"] if row.kind == "kill" else []
    words += ["training went on, parameters finite"]
    without = sum(line["penalty"] is None for line in updates if line["time"] > fired[0]["time"])
    if row.alone:
        words.append("no peer taken up")
    elif row.joining:
        words.append(f"no good peer yet, one in use {without} updates later")
    else:
        words.append(f"penalty off for {without} updates, then on again" if without else "last good peer kept")
    if not row.recovers:
        words.append("exchange over")
    return ", ".join(words)


@contextmanager
def everything() -> Iterator[tuple[Places, Starter, Path]]:
    """What `run` takes: the places, the starter, a temporary folder."""
    server = S3Server()
    try:
        with Starter() as starter, tempfile.TemporaryDirectory(prefix="cd-", ignore_cleanup_errors=True) as folder:
            yield Places(server), starter, Path(folder)
    finally:
        server.stop()


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown, in the order of the rows."""
    lines = ["| point | fault | met by | store | outcome | counted | longest update |", "|---|---|---|---|---|---|---|"]
    for outcome in outcomes:
        row = outcome.row
        causes = ", ".join(f"{cause} {count}" for cause, count in outcome.causes.items()) or "nothing"
        cells = [row.point, row.kind, row.where, row.store, outcome.text, causes, f"{outcome.longest:.2f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix, or what `--only` picks, and print its table; 1 when a row failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description=__doc__)
    parser.add_argument("--only", default="", help="only rows whose name contains this, e.g. 'payload get'")
    wanted = [row for row in rows() if parser.parse_args(arguments).only in str(row)]
    with everything() as (places, starter, folder), ThreadPoolExecutor(AT_ONCE) as pool:
        began = time.monotonic()
        running = {pool.submit(run, row, places, starter, folder / str(n)): n for n, row in enumerate(wanted)}
        outcomes: dict[int, Outcome] = {}
        for future in as_completed(running):
            outcome = outcomes[running[future]] = _result(future.result, wanted[running[future]])
            print(f"{len(outcomes)}/{len(wanted)}  {outcome.seconds:4.1f} s  {outcome.row}: {outcome.text}", flush=True)
            if outcome.trouble:
                print(outcome.trouble, flush=True)
    print(f"\n{table([outcomes[n] for n in sorted(outcomes)])}\n")
    failed = [outcome for outcome in outcomes.values() if not outcome.good]
    print(f"{len(outcomes)} rows, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _result(result: Callable[[], Outcome], row: Row) -> Outcome:
    try:
        return result()
    except Exception:
        return Outcome(row, {"run": False}, "NOT run", trouble=traceback.format_exc())


if __name__ == "__main__":
    sys.exit(main())
