"""Thousands of exchanges among three peers with random faults and deaths: `python -m tests.faults.soak`, `make soak`.

Every peer meets faults at all points, about one in forty calls; two of them are killed now and then and started again.
The third never dies: its memory, threads and open files are watched. The seed decides which faults and deaths there
are. Exits with 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.tiny_peer import PeerProcesses, Plan, Starter, lines, wait_for

PEERS = 3
INTERVAL = 2
DEATH_SECONDS = 8.0  # between two deaths, on average
WARM_UP = 0.25  # share of the time that is not looked at for growth
PARTS = 8
GROWTH_GOAL = 1_000_000  # bytes in 1,000 exchanges
END_SECONDS = 60.0


@dataclass(frozen=True)
class Goal:
    """One line of the report; `met` is None where there is nothing to be met."""

    name: str
    value: str
    met: bool | None = None


def plans(folder: Path, seed: int, seconds: float) -> list[Plan]:
    """Three peers over a folder."""
    options = {"dir": str(folder / "store"), "run_id": "soak", "peers": PEERS, "interval": INTERVAL, "timeout": 10.0}
    return [
        Plan(
            folder=str(folder / f"peer{peer}"),
            together=str(folder),
            options={**options, "peer": peer},
            seed=seed + peer,
            random_faults=f"{seed} {peer}",
            begin="start",
            until="stop",
            seconds=seconds + END_SECONDS,
            pause=0.002,
            poll=0.01,
            heartbeat=0.05,
        )
        for peer in range(PEERS)
    ]


def soak(folder: Path, seed: int, seconds: float) -> list[PeerProcesses]:
    """Let the peers train for so long, killing and restarting all but the first; they have ended then."""
    draw = random.Random(seed)
    with Starter() as starter:
        peers = [PeerProcesses(starter, plan) for plan in plans(folder, seed, seconds)]
        for peer in peers:
            peer.start()
        end = time.monotonic() + seconds
        death, told = time.monotonic() + DEATH_SECONDS, 0.0
        while time.monotonic() < end and peers[0].running():
            if time.monotonic() > death:
                peers[draw.randrange(1, PEERS)].kill()
                death = time.monotonic() + draw.uniform(0.5, 1.5) * DEATH_SECONDS
            for peer in peers[1:]:
                if not peer.running():
                    peer.start()
            if time.monotonic() > told:
                print(_progress(peers, end - time.monotonic()), flush=True)
                told = time.monotonic() + 15
            time.sleep(0.05)
        (folder / "stop").touch()
        wait_for(lambda: not any(peer.running() for peer in peers), END_SECONDS)
    return peers


def _progress(peers: Sequence[PeerProcesses], left: float) -> str:
    samples = lines(peers[0].plan.file("resources"))
    memory = f", {samples[-1]['anonymous'] / 1e6:.1f} MB" if samples else ""
    starts = sum(peer.starts for peer in peers)
    fired = sum(len(peer.fired()) for peer in peers)
    return f"{left:4.0f} s left: {fired} faults, {starts - PEERS} restarts{memory}"


def report(peers: Sequence[PeerProcesses]) -> list[Goal]:
    """What came of it, read off what the peers wrote down."""
    exchanges = [_exchanges(peer) for peer in peers]
    fired = Counter(line["kind"] for peer in peers for line in peer.fired())
    causes = sum((Counter(peer.causes()) for peer in peers), Counter())
    restarts = sum(peer.starts - 1 for peer in peers)
    ended = all(peer.ended() for peer in peers)
    samples = lines(peers[0].plan.file("resources"))
    memory = [(sample["taken"], sample["anonymous"]) for sample in samples]
    growth, whole = _growth(memory), (memory[-1][1] - memory[0][1] if memory else 0) / 1e6
    return [
        Goal("exchanges (snapshots taken up)", f"{sum(exchanges):,}", all(count > 0 for count in exchanges)),
        Goal("faults fired", _counted(fired), bool(fired)),
        Goal("deaths and restarts", str(restarts), restarts > 0),
        Goal("incidents, by cause", _counted(causes)),
        Goal("all peers came to their end", _yes(ended), ended),
        Goal("parameters finite", *_all_finite(peers)),
        Goal(
            "resident memory, first peer",
            f"{growth / 1e6:+.3f} MB in 1,000 exchanges; {whole:+.1f} MB from the beginning to the end",
            growth < GROWTH_GOAL,
        ),
        *[Goal(f"{name}, first peer", *_no_more(samples, name)) for name in ("threads", "files")],
        Goal("left on the machine by those who ended", *_nothing_left(peers)),
    ]


def _exchanges(peer: PeerProcesses) -> int:
    """How often anything new was taken up."""
    count, before = 0, {}
    for line in peer.records():
        used: Mapping[str, Any] = line.get("used", {})
        count += sum(before.get(other) != reference for other, reference in used.items())
        before = used
    return count


def _growth(points: Sequence[tuple[int, int]]) -> float:
    """Bytes in 1,000 exchanges after warming up: the median of the slopes of straight lines through parts of the time.

    A leak shows in every part; a table of Python's that doubles once does not count as one.
    """
    later = points[int(WARM_UP * len(points)) :]
    size = len(later) // PARTS
    if size < 3:
        return float("inf")  # too little to say anything
    parts = [later[start : start + size] for start in range(0, PARTS * size, size)]
    return 1000 * statistics.median(statistics.linear_regression(*zip(*part, strict=True)).slope for part in parts)


def _no_more(samples: Sequence[Mapping[str, Any]], name: str) -> tuple[str, bool]:
    """Medians early and late: threads of the store's library come and go."""
    early = samples[int(WARM_UP * len(samples)) : len(samples) // 2]
    late = samples[-len(early) :]
    if not early:
        return "not known", False
    before, after = (statistics.median(sample[name] for sample in part) for part in (early, late))
    return f"{before:g} early, {after:g} late", after <= before + 1


def _all_finite(peers: Sequence[PeerProcesses]) -> tuple[str, bool]:
    finite = all(peer.ended() and peer.end()["finite"] for peer in peers)
    return _yes(finite), finite


def _nothing_left(peers: Sequence[PeerProcesses]) -> tuple[str, bool]:
    threads = [name for peer in peers if peer.ended() for name in peer.end()["left"]]
    files = [
        path.name
        for peer in peers
        for machine in Path(peer.plan.folder).glob("machine-*")
        for path in machine.iterdir()
    ]
    return ", ".join(threads + files) or "nothing", not threads and not files


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in sorted(counts)) or "none"


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def table(goals: Sequence[Goal]) -> str:
    """As Markdown."""
    marks = {None: "", True: "met", False: "MISSED"}
    return "\n".join(
        ["| | found | goal |", "|---|---|---|", *[f"| {g.name} | {g.value} | {marks[g.met]} |" for g in goals]]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak and report; 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="which faults and deaths")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cd-", ignore_cleanup_errors=True) as folder:
        peers = soak(Path(folder), options.seed, 60 * options.minutes)
        goals = report(peers)
        print(f"\n{table(goals)}\n")
        failed = [goal.name for goal in goals if goal.met is False]
        for peer in peers if failed else ():
            print(peer.output())
    print(f"seed {options.seed}, {options.minutes:g} minutes" + (f"; missed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
