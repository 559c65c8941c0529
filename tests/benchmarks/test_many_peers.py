"""The simulation of many peers counts what peers really ask of the store."""

import threading

import pytest

from benchmarks import many_peers
from codistill.exchange.snapshot import HostBuffer


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_peers, "INTERVAL_SECONDS", 8.0)
    monkeypatch.setattr(many_peers, "REQUEST_SECONDS", 0.005)


def test_four_peers_that_know_all_others_fetch_three_snapshots_and_put_one_in_every_interval(short: None) -> None:
    threads = threading.active_count()
    found = many_peers.simulate("all", 4)
    snapshot = HostBuffer(many_peers.tiny(0).state_dict(), "float32").nbytes
    assert found.in_use == pytest.approx(3)
    assert found.snapshots == pytest.approx(3 * snapshot, rel=0.35)  # one may fall beyond the ends of the measurement
    assert found.written > snapshot
    assert found.put > 3  # payload, manifest, latest.json, and heartbeats
    assert found.polls > 3 * 4
    assert found.incidents == 0
    assert found.age_max >= found.staleness_mean > 0
    assert threading.active_count() == threads
