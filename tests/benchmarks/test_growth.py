"""What is expected of a growing run is what the code really does."""

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.loopback import Unavailable, alone


def test_a_peer_of_two_sends_one_snapshot_and_fetches_one() -> None:
    try:
        found = alone("benchmarks.growth_worker", "exchange_bytes", json.dumps([1, 2, "float32", 2]))
    except Unavailable as error:
        pytest.skip(f"no network namespace: {error}")
    measured, expected = growth.counted(found, peers=2)
    assert len(measured) == 2
    assert statistics.median(measured) == pytest.approx(statistics.median(expected), rel=0.05)


def test_a_peer_holds_a_buffer_and_a_module_and_maps_two_files() -> None:
    found = growth.memory_at(20, peers=2, exchanges=2)
    measured = statistics.median(found["peaks"]) - found["plain"]
    assert measured == pytest.approx(growth.expected_memory(found["model"], 1, 8e6), rel=0.4)


def test_workers_meet_in_a_broadcast_and_a_minimum_and_take_up_together() -> None:
    found = growth.of_workers(0.1, workers=2, exchanges=2)
    assert len(found["held"]) == 2
    assert len(found["meetings"]) == len(found["hops"]) > 0
    assert growth.expected_meeting(hop=1.0, workers=2) == 1 + 2
    assert growth.expected_meeting(hop=1.0, workers=4) == 2 + 6


def test_a_picture_of_each_axis_is_drawn_from_rows_alone(tmp_path: Path) -> None:
    rows = [
        growth.point(axis, "time of an update", "ms", at, [0.1, 0.2], [0.1, 0.1], series)
        for axis in growth.UNITS
        for at in (2, 4)
        for series in ("float32", "bfloat16")
    ]
    growth.draw(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"growth-{axis}.png" for axis in growth.UNITS}
