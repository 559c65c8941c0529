"""Incidents, the distance from initialisation and metrics.jsonl: what is reported, and that it never ends a run."""

import json
import logging
import math
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from codistill import KEYS, ExchangeFailed
from codistill.meters import INITIAL_WEIGHTS, METRICS_FILE, Distance, Incidents, MetricsFile


def test_the_metric_keys_are_frozen():
    assert KEYS == (
        "alpha",
        "loss",
        "agreement",
        "peers",
        "staleness",
        "gap",
        "distance",
        "sent",
        "received",
        "seconds",
        "skipped",
        "incidents",
    )


def test_every_incident_is_counted_and_each_cause_is_logged_once_for_each_peer(caplog):
    incidents = Incidents(fatal=False)
    with caplog.at_level(logging.WARNING, "codistill"):
        for about in ("1", "1", "2"):
            incidents.report("hash", f"peer {about}: wrong digest", about=about)
        incidents.report("storage", "the store is gone")
    assert (incidents.counts, incidents.total) == ({"hash": 3, "storage": 1}, 4)
    assert [record.getMessage() for record in caplog.records] == [
        "codistill: peer 1: wrong digest (hash; counted, and not logged again for the same cause)",
        "codistill: peer 2: wrong digest (hash; counted, and not logged again for the same cause)",
        "codistill: the store is gone (storage; counted, and not logged again for the same cause)",
    ]


def test_incidents_of_many_threads_are_all_counted():
    incidents = Incidents(fatal=False)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: incidents.report(f"cause {i % 3}", "it failed"), range(300)))
    assert incidents.counts == {"cause 0": 100, "cause 1": 100, "cause 2": 100}


def test_only_a_fatal_incident_ends_the_run_and_it_names_the_first():
    patient, fatal = Incidents(fatal=False), Incidents(fatal=True)
    fatal.check()
    for incidents in (patient, fatal):
        incidents.report("hash", "the first")
        incidents.report("storage", "the second")
    patient.check()
    with pytest.raises(ExchangeFailed) as caught:
        fatal.check()
    assert str(caught.value) == "the first; ended by --codistill-on-error fail"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_distance_is_the_l2_norm_over_the_named_parameters(tmp_path):
    start = {"w": torch.zeros(2, 2), "v": torch.ones(3), "buffer": torch.zeros(4)}
    distance = Distance(tmp_path, ["w", "v"])
    distance.record(start)
    assert distance.measure(start) == 0
    moved = {"w": torch.full((2, 2), 2.0), "v": torch.tensor([1.0, 1.0, 4.0]), "buffer": torch.full((4,), 9.0)}
    assert distance.measure(moved) == pytest.approx(5.0)
    assert [path.name for path in tmp_path.iterdir()] == [INITIAL_WEIGHTS]


def test_the_distance_survives_a_restart_and_takes_low_precision(tmp_path):
    Distance(tmp_path, ["w"]).record({"w": torch.zeros(4, dtype=torch.bfloat16)})
    assert Distance(tmp_path, ["w"]).measure({"w": torch.full((4,), 0.5, dtype=torch.float16)}) == 1.0


def test_tied_and_non_contiguous_parameters_can_be_recorded(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    Distance(tmp_path, ["a", "b", "t"]).record({"a": shared, "b": shared, "t": shared.t()})
    moved = {"a": shared + 1, "b": shared, "t": shared.t()}
    assert Distance(tmp_path, ["a", "b", "t"]).measure(moved) == pytest.approx(math.sqrt(6))


def test_without_the_initial_weights_the_distance_is_not_a_number(tmp_path):
    assert math.isnan(Distance(tmp_path, ["w"]).measure({"w": torch.ones(1)}))


def test_metrics_are_appended_as_strict_json_lines_that_tell_the_time(tmp_path):
    incidents = Incidents(fatal=False)
    file = MetricsFile(tmp_path, incidents)
    for update in (1, 2):
        file.write({"update": update, "loss": math.nan, "alpha": math.inf})
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    walls = [line.pop("wall") for line in lines]
    starts = {line.pop("started") for line in lines}
    assert lines == [{"update": u, "loss": None, "alpha": None} for u in (1, 2)]
    assert 0 <= walls[0] <= walls[1]
    assert abs(time.time() - starts.pop()) < 60
    assert not starts
    assert incidents.total == 0


def test_lines_wait_for_the_distance_at_their_own_update_and_stay_in_order(tmp_path):
    file = MetricsFile(tmp_path, Incidents(fatal=False))

    def written():
        path = tmp_path / METRICS_FILE
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        return [(line["update"], line["distance"]) for line in lines]

    file.write({"update": 1, "distance": math.nan}, waits=True)
    file.write({"update": 2, "distance": math.nan})
    assert written() == []
    file.measured(1, 1.5)
    assert written() == [(1, 1.5), (2, None)]
    file.measured(3, 3.5)  # before the line is there
    file.write({"update": 3, "distance": math.nan}, waits=True)
    assert written()[2:] == [(3, 3.5)]
    file.write({"update": 4, "distance": math.nan}, waits=True)
    file.write({"update": 5, "distance": math.nan}, waits=True)
    file.measured(5, 5.5)
    assert written()[3:] == [(4, None), (5, 5.5)]
    file.write({"update": 6, "distance": math.nan}, waits=True)
    file.flush()
    assert written()[5:] == [(6, None)]


def test_metrics_that_cannot_be_written_are_an_incident(tmp_path):
    incidents = Incidents(fatal=False)
    MetricsFile(tmp_path / "missing", incidents).write({"update": 1})
    assert incidents.counts == {"metrics": 1}
