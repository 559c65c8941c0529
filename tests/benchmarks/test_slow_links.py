"""The question `links` sets methods beside each other the right way round, and waits for no worker that fails."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import slow_links
from benchmarks.slow_links import MAIN, METHODS, Cell, Failed


def cell(seconds: float, sent: float, **told: Any) -> Cell:
    return Cell([seconds], sent, sent, [{"exchanges": 3, "skipped": 0, "incidents": 0, "staleness": 150.0} | told] * 2)


FOUND = {
    "alone": {None: cell(0.1, 0)},
    "DDP": {None: cell(0.15, 46e6), 100.0: cell(3.8, 46e6)},
    "checkpoint": {None: cell(0.125, 0.46e6), 100.0: cell(0.125, 0.46e6)},
}


def rows() -> dict[str, Any]:
    found = [row for name in FOUND for row in slow_links.alike(MAIN, name, METHODS[name], FOUND, 100)]
    return {row.name.removeprefix(f"{MAIN}: "): row for row in [*found, *slow_links.side_by_side(MAIN, FOUND)]}


def test_ratios_above_one_say_that_ours_is_faster_and_sends_less():
    found = rows()
    assert found["checkpoint / DDP, throughput, 100 Mbit/s"].ratio == pytest.approx(3.8 / 0.125)
    assert found["bytes sent, DDP / checkpoint"].ratio == pytest.approx(100)
    assert found["checkpoint / alone, unthrottled"].ratio == pytest.approx(0.8)
    assert found["DDP, 100 Mbit/s / unthrottled"].ratio == pytest.approx(0.15 / 3.8)
    assert found["checkpoint, staleness in intervals, 100 Mbit/s"].ratio == pytest.approx(1.5)


def test_goals_are_those_of_exchange_by_checkpoint_at_100_mbit():
    assert {name: (row.goal, row.more) for name, row in rows().items() if row.goal is not None} == {
        "checkpoint, 100 Mbit/s / unthrottled": (0.95, True),
        "checkpoint, staleness in intervals, 100 Mbit/s": (2.0, False),
        "checkpoint / DDP, throughput, 100 Mbit/s": (5.0, True),
        "bytes sent, DDP / checkpoint": (95.0, True),
    }


def test_break_even_is_where_both_take_as_long():
    theirs, ours = FOUND["DDP"][None], cell(0.2, 0.46e6)
    mbit = slow_links.break_even(theirs, ours)
    assert slow_links.predicted(METHODS["DDP"], theirs, mbit) == pytest.approx(0.2, rel=1e-3)
    assert "any link" in slow_links.break_even(theirs, FOUND["checkpoint"][None])


@pytest.mark.parametrize(
    ("code", "limit", "why"),
    [
        ("raise KeyError('no such method')", 60.0, "KeyError: 'no such method'"),
        ("import time; time.sleep(300)", 0.5, "no answer within 0 s"),
    ],
)
def test_a_worker_that_fails_or_hangs_is_not_waited_for(tmp_path: Path, code: str, limit: float, why: str):
    with contextlib.ExitStack() as ends:
        workers = []
        for rank, program in enumerate(("print('{}')", code)):
            log = ends.enter_context(open(tmp_path / f"{rank}.log", "w", encoding="utf-8"))
            command = [sys.executable, "-c", program]
            workers.append(ends.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)))
        with pytest.raises(Failed, match=why):
            slow_links.answers(workers, tmp_path, limit)
        workers[1].kill()
