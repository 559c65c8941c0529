"""Rows are kept as they were, compared by their ratios alone, and shown with their goals."""

import json
from pathlib import Path

import pytest

from benchmarks.record import Row, compare, path_of, read, write


def test_a_row_takes_the_median_and_quartiles_of_its_ratios():
    row = Row.of("update", [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6])
    assert (row.low, row.ratio, row.high) == pytest.approx((1.1, 1.3, 1.5))
    two = Row.of("update", [1.0, 2.0])
    assert (two.low, two.ratio, two.high) == (1.0, 1.5, 2.0)  # nothing that was not measured
    assert Row.of("update", [1.25]) == Row("update", 1.25, 1.25, 1.25)


@pytest.mark.parametrize(
    ("ratio", "more", "met"), [(1.30, False, True), (1.31, False, False), (1.30, True, True), (1.29, True, False)]
)
def test_a_goal_is_met_from_the_side_that_is_better(ratio, more, met):
    row = Row("update", ratio, ratio, ratio, goal=1.30, more=more)
    assert row.met is met
    assert ("met" if met else "missed") in row.line()


def test_rows_come_back_from_their_file_as_they_were(tmp_path: Path):
    rows = [
        Row.of("a", [1.0, 2.0, 3.0], goal=2.0, details={"ms": 12.5, "curve": [[1, 2], [3, 4]]}),
        Row("b", 0.5, 0.4, 0.6),
    ]
    path = path_of(tmp_path / "new", "update", "cpu")
    write(path, "update", rows, "cpu")
    assert read(path) == rows
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["machine"]["packages"]["torch"] != "not installed"
    assert kept["command"] == "make bench ARGS=update"


@pytest.mark.parametrize(
    ("kept", "now", "more", "holds", "word"),
    [
        (1.0, 1.09, False, True, "as before"),
        (1.0, 1.11, False, False, "worse"),
        (1.0, 0.80, False, True, "better"),
        (1.0, 0.91, True, True, "as before"),
        (1.0, 0.89, True, False, "worse"),
        (1.0, 5.0, True, True, "better"),
    ],
)
def test_only_a_ratio_that_is_worse_than_tolerated_fails_a_comparison(kept, now, more, holds, word):
    ((verdict, line),) = compare([Row("x", kept, 0, 0, more=more)], [Row("x", now, 0, 0, more=more)], tolerance=0.1)
    assert verdict is holds
    assert f"x: {word}" in line


def test_a_kept_row_that_is_not_measured_any_more_fails_a_comparison():
    ((verdict, line),) = compare([Row("gone", 1, 1, 1)], [Row("new", 1, 1, 1)], tolerance=0.1)
    assert not verdict
    assert "gone: not measured now" in line
