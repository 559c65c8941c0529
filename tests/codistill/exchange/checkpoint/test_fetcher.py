"""Fetching in the background: what is found for which wish, and what is refused, counted and never taken up."""

import hashlib
import math
import shutil
import threading
import time

import pytest
import torch

from codistill.exchange.checkpoint import fetcher as fetcher_module
from codistill.exchange.checkpoint.fetcher import FILES_PER_PEER, NEWEST, Fetcher, Wish, snapshot_file
from codistill.exchange.manifest import Reference
from codistill.exchange.snapshot import Template
from codistill.exchange.store import RunStore
from codistill.meters import Incidents
from tests.fixtures_peers import RUN, Writer, identity, like, quick_exchange, until, weights  # noqa: F401
from tests.fixtures_store import failing_objects, make_manifest, memory_objects  # noqa: F401

# ruff: noqa: F811


@pytest.fixture
def store(failing_objects):
    return RunStore(failing_objects, RUN)


@pytest.fixture
def writer(store):
    return Writer(store)


@pytest.fixture
def incidents():
    return Incidents(fatal=False)


def files(folder, *manifests):
    """What lies on the machine when these snapshots, and no others, do."""
    found = [snapshot_file(folder, manifest.sha256) for manifest in manifests]
    return {path.with_suffix(kind) for path in found for kind in (".safetensors", ".json")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "snapshots").mkdir()
    return tmp_path / "snapshots"


@pytest.fixture
def fetcher(store, folder, incidents, quick_exchange):
    made = Fetcher(store, folder, [1, 2], like(Template(weights(0), "float32")), "float32", identity(0), incidents)
    made.start()
    yield made
    made.close(5)


def look_again(failing_objects, times=3):
    """Wait until the store was asked `times` more."""
    enough = failing_objects.calls["get"] + times
    until(lambda: failing_objects.calls["get"] >= enough)


def read(folder, manifest):
    return Template(weights(0), "float32").open(snapshot_file(folder, manifest.sha256))


def test_the_newest_snapshot_is_fetched_verified_and_then_replaced_by_newer_ones(fetcher, folder, writer):
    fetcher.wish(1, NEWEST)
    for update in (10, 20):
        manifest = writer.publish(weights(update), update)
        until(lambda manifest=manifest: fetcher.found(1) == manifest)
        assert all(torch.equal(read(folder, manifest)[name], value) for name, value in weights(update).items())
    assert fetcher.received == 2 * manifest.bytes
    assert fetcher.found(2) is None


def test_no_peer_is_looked_at_before_it_is_wished_for(fetcher, writer, failing_objects):
    writer.publish(weights(1), 10)
    before = failing_objects.calls["get"]
    time.sleep(0.1)
    assert failing_objects.calls["get"] == before


def test_the_same_snapshot_is_fetched_once(fetcher, writer, failing_objects):
    manifest = writer.publish(weights(1), 10)
    fetcher.wish(1, NEWEST)
    until(lambda: fetcher.found(1))
    writer.announce(manifest)
    look_again(failing_objects)
    assert (failing_objects.calls["download"], fetcher.received) == (1, manifest.bytes)


def test_an_exact_snapshot_is_found_though_there_are_newer_ones(fetcher, writer):
    wanted, _ = writer.publish(weights(1), 10), writer.publish(weights(2), 20)
    fetcher.wish(1, Wish(reference=Reference(1, 10, 1)))
    assert until(lambda: fetcher.found(1)) == wanted


def test_the_snapshot_of_an_update_is_waited_for_and_the_newest_start_of_a_peer_counts(fetcher, writer):
    writer.publish(weights(1), 10)
    fetcher.wish(1, Wish(update=20))
    fetcher.wait(0.2)
    assert (fetcher.found(1), fetcher.hopeless(1)) == (None, False)
    writer.publish(weights(2), 20)
    writer.incarnation = 2
    again = writer.publish(weights(2), 20)
    fetcher.wish(1, Wish(update=10))
    fetcher.wish(1, Wish(update=20))
    fetcher.wait(20)
    assert fetcher.found(1) == again


def test_a_peer_that_has_ended_is_found_at_every_update_by_its_final_snapshot(fetcher, writer):
    final = writer.snapshot(weights(1), 15, final=True)
    writer.announce(final)
    fetcher.wish(1, Wish(update=20))
    fetcher.wait(0.2)
    assert fetcher.found(1) is None  # not closed: it may still go on
    writer.announce(final, closed=True)
    assert until(lambda: fetcher.found(1)) == final


def test_a_new_wish_forgets_what_was_found(fetcher, writer):
    wanted = writer.publish(weights(1), 10)
    fetcher.wish(1, NEWEST)
    until(lambda: fetcher.found(1))
    fetcher.wish(1, Wish(update=99))
    assert fetcher.found(1) is None
    fetcher.wish(1, Wish(reference=Reference(1, 10, 1)))
    assert until(lambda: fetcher.found(1)) == wanted


def test_a_snapshot_that_is_gone_makes_an_exact_wish_hopeless(fetcher, writer):
    writer.publish(weights(1), 10)
    fetcher.wish(1, Wish(reference=Reference(1, 5, 1)))
    began = time.monotonic()
    fetcher.wait(20)
    assert fetcher.hopeless(1)
    assert time.monotonic() - began < 10


def test_another_snapshot_in_the_place_of_an_exact_one_makes_the_wish_hopeless(fetcher, writer):
    there = writer.publish(weights(1), 10)
    fetcher.wish(1, Wish(reference=there.reference, sha256="0" * 64))
    until(lambda: fetcher.hopeless(1))
    assert (fetcher.found(1), fetcher.received) == (None, 0)
    fetcher.wish(1, Wish(reference=there.reference, sha256=there.sha256))
    assert until(lambda: fetcher.found(1)) == there


def test_waiting_ends_as_soon_as_all_wishes_are_settled(fetcher, writer):
    writer.publish(weights(1), 10)
    Writer(writer.store, peer=2).publish(weights(2), 10)
    for peer in (1, 2):
        fetcher.wish(peer, Wish(update=10))
    began = time.monotonic()
    fetcher.wait(20)
    assert time.monotonic() - began < 10
    assert fetcher.found(1)
    assert fetcher.found(2)


def test_the_lowest_floor_counts_a_silent_peer_as_0(fetcher, writer):
    writer.announce(None, resume_floor=70)
    fetcher.wish(1, NEWEST)
    fetcher.wish(2, NEWEST)
    until(lambda: fetcher.presence.lowest_floor([1]) == 70)
    assert fetcher.lowest_floor() == 0
    Writer(writer.store, peer=2).announce(None, resume_floor=30)
    until(lambda: fetcher.lowest_floor() == 30)


def test_whom_nobody_attends_to_any_more_is_not_asked_and_leaves_no_files(fetcher, folder, writer, failing_objects):
    second = Writer(writer.store, peer=2)
    manifests = [one.publish(weights(one.peer), 10, init_hash=identity(one.peer).init_hash) for one in (writer, second)]
    for peer in (1, 2):
        fetcher.wish(peer, NEWEST)
    until(lambda: fetcher.found(1) and fetcher.found(2))
    fetcher.attend([2], keep=[1])
    look_again(failing_objects)
    assert set(folder.iterdir()) == files(folder, *manifests)
    fetcher.attend([2], keep=[])
    until(lambda: set(folder.iterdir()) == files(folder, manifests[1]))
    assert (fetcher.found(1), fetcher.found(2)) == (None, manifests[1])
    writer.publish(weights(3), 20)
    look_again(failing_objects)
    assert set(folder.iterdir()) == files(folder, manifests[1])
    fetcher.attend([1, 2], keep=[])
    fetcher.wish(1, NEWEST)
    assert until(lambda: fetcher.found(1)).update == 20


def test_strangers_are_looked_at_in_turn_and_seldom(store, folder, incidents, failing_objects, quick_exchange):
    strangers = list(range(1, 9))
    template = like(Template(weights(0), "float32"))
    made = Fetcher(store, folder, strangers, template, "float32", identity(0), incidents, scouted=strangers)
    asked = []
    get = failing_objects.get
    failing_objects.get = lambda key, **limit: (asked.append(int(key.split("/")[2])), get(key, **limit))[1]
    made.wish(8, NEWEST)
    made.start()
    until(lambda: asked.count(1) == 3)
    made.close(5)
    seldom = [peer for peer in asked if peer != 8]
    assert seldom == (strangers[:-1] * 3)[: len(seldom)]
    assert asked.count(8) > 1.5 * len(seldom)


def test_trouble_with_a_stranger_is_an_incident_and_holds_nobody_up(store, folder, incidents, writer, failing_objects):
    template = like(Template(weights(0), "float32"))
    made = Fetcher(store, folder, [1, 2], template, "float32", identity(0), incidents, scouted=[2])
    failing_objects.put(f"{RUN}/peers/2/latest.json", b"spoilt")
    manifest = writer.publish(weights(1), 10)
    made.wish(1, NEWEST)
    made.start()
    until(lambda: made.found(1) == manifest and incidents.total)
    made.close(5)
    assert set(incidents.counts) == {"format"}


def wrong_name(state):
    return {**{name: value for name, value in state.items() if name != "c"}, "d": state["c"]}


REFUSALS = {
    "another vocabulary": ("fingerprint", {"fingerprint": "e" * 64}, None),
    "the same initial weights": ("init", {"init_hash": identity(0).init_hash}, None),
    "another precision": ("dtype", {"dtype": "float16"}, None),
    "NaN weights": ("non-finite", {}, lambda state: {**state, "c": state["c"] * math.nan}),
    "infinite weights": ("non-finite", {}, lambda state: {**state, "a": state["a"] / 0}),
    "wrong names": ("names", {}, wrong_name),
    "a wrong shape": ("shape", {}, lambda state: {**state, "c": state["c"].view(7, 1)}),
    "a wrong dtype": ("dtype", {}, lambda state: {**state, "b": state["b"].to(torch.int32)}),
    "more than a snapshot can have": ("size", {"bytes": 2**40}, None),
}
LINES = {
    "another vocabulary": "peer 1: its dictionary or class list differs from ours",
    "the same initial weights": "peer 1: it started from the same initial weights as this peer; "
    "give each peer its own seed, or, if both start from one checkpoint, some weights of its own (a fresh head)",
    "another precision": "peer 1: its weights travel as float16, the run agreed on float32",
    "NaN weights": "peer 1: snapshot: c holds NaN or infinity",
    "wrong names": "peer 1: snapshot: 'c' is missing",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_snapshot_is_refused_once_and_the_last_good_one_kept(
    fetcher, folder, writer, incidents, failing_objects, caplog, what
):
    cause, changes, spoil = REFUSALS[what]
    good = writer.publish(weights(1), 10)
    fetcher.wish(1, NEWEST)
    until(lambda: fetcher.found(1))
    writer.publish(spoil(weights(2)) if spoil else weights(2), 20, **changes)
    until(lambda: incidents.total)
    look_again(failing_objects)
    assert incidents.counts == {cause: 1}
    assert fetcher.found(1) == good
    assert set(folder.iterdir()) == files(folder, good)
    assert LINES.get(what, "") in caplog.text
    after = writer.publish(weights(3), 30)
    until(lambda: fetcher.found(1) == after)
    assert incidents.counts == {cause: 1}


@pytest.mark.parametrize(
    ("cause", "spoil"),
    [
        ("size", lambda data: data[:-1]),
        ("size", lambda data: data + b"\0"),
        ("size", lambda data: b""),
        ("hash", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("hash", lambda data: bytes(len(data))),
    ],
    ids=["truncated", "longer", "empty", "a flipped bit", "zeroes"],
)
def test_a_payload_that_is_not_what_its_manifest_says_is_refused_once(
    fetcher, folder, writer, incidents, failing_objects, cause, spoil
):
    good = writer.publish(weights(1), 10)
    fetcher.wish(1, NEWEST)
    until(lambda: fetcher.found(1))
    payload = writer.store.objects.get(f"{RUN}/peers/1/1/{good.payload}", limit=10**6)
    bad = spoil(payload)
    sha256 = hashlib.sha256(payload).hexdigest() if cause == "size" else "d" * 64
    writer.publish(weights(2), 20, payload=bad, sha256=sha256 if cause == "hash" else hashlib.sha256(bad).hexdigest())
    until(lambda: incidents.total)
    look_again(failing_objects)
    assert incidents.counts == {cause: 1}
    assert fetcher.found(1) == good
    assert set(folder.iterdir()) == files(folder, good)


@pytest.mark.parametrize(("incarnation", "sequence"), [(1, 99), (2, 1)])
def test_an_older_snapshot_than_the_newest_seen_is_refused_once(
    fetcher, writer, incidents, failing_objects, incarnation, sequence
):
    writer.incarnation, writer.sequence = 2, 1
    good = writer.publish(weights(1), 10)
    fetcher.wish(1, NEWEST)
    until(lambda: fetcher.found(1))
    writer.incarnation, writer.sequence = incarnation, sequence - 1
    writer.publish(weights(2), 20)
    until(lambda: incidents.total)
    look_again(failing_objects)
    assert incidents.counts == {"rollback": 1}
    assert fetcher.found(1) == good


def test_trouble_with_a_snapshot_does_not_open_a_way_back_to_older_ones(fetcher, writer, incidents):
    old = writer.snapshot(weights(1), 10)
    good = writer.publish(weights(2), 20)
    fetcher.wish(1, NEWEST)
    until(lambda: fetcher.found(1) == good)
    pruned = writer.snapshot(weights(3), 30)
    writer.store.objects.delete([f"{RUN}/peers/1/1/{pruned.payload}"])
    writer.announce(pruned)
    until(lambda: incidents.counts["pruned"])
    writer.announce(old)
    until(lambda: incidents.counts["rollback"])
    assert fetcher.found(1) == good


def test_a_snapshot_pruned_while_it_is_read_is_looked_for_again(fetcher, writer, incidents, failing_objects):
    manifest = writer.snapshot(weights(1), 10)
    writer.store.objects.delete([f"{RUN}/peers/1/1/{manifest.payload}"])
    fetcher.wish(1, NEWEST)
    writer.announce(manifest)
    until(lambda: incidents.counts["pruned"])
    newer = writer.publish(weights(2), 20)
    until(lambda: fetcher.found(1) == newer)
    assert set(incidents.counts) == {"pruned"}


@pytest.mark.parametrize("operation", ["get", "download"])
def test_trouble_with_the_store_is_an_incident_and_tried_again(fetcher, writer, incidents, failing_objects, operation):
    failing_objects.fail_at(operation)
    manifest = writer.publish(weights(1), 10)
    fetcher.wish(1, NEWEST)
    until(lambda: fetcher.found(1) == manifest)
    assert failing_objects.fired == [operation]
    assert incidents.counts == {"storage": 1}


def test_trouble_with_the_disk_is_an_incident_and_tried_again(store, writer, incidents, folder, quick_exchange):
    shutil.rmtree(folder)
    made = Fetcher(store, folder, [1], like(Template(weights(0), "float32")), "float32", identity(0), incidents)
    made.start()
    manifest = writer.publish(weights(1), 10)
    made.wish(1, NEWEST)
    until(lambda: incidents.total)
    folder.mkdir()
    until(lambda: made.found(1) == manifest)
    made.close(5)
    assert set(incidents.counts) <= {"disk", "storage"}


def test_a_spoilt_latest_costs_nothing_but_a_count(fetcher, writer, incidents, failing_objects):
    good = writer.publish(weights(1), 10)
    fetcher.wish(1, NEWEST)
    until(lambda: fetcher.found(1))
    failing_objects.put(f"{RUN}/peers/1/latest.json", b'{"format": 1}')
    until(lambda: incidents.counts["format"])
    assert fetcher.found(1) == good
    newer = writer.publish(weights(2), 20)
    until(lambda: fetcher.found(1) == newer)


def test_a_latest_of_another_run_or_peer_is_refused(fetcher, writer, incidents, failing_objects):
    manifest = make_manifest(run=RUN, peer=2, init_hash=identity(1).init_hash)
    other = Writer(writer.store, peer=2).announce(manifest)
    failing_objects.put(f"{RUN}/peers/1/latest.json", other.to_json())
    fetcher.wish(1, NEWEST)
    until(lambda: incidents.counts["peer"])
    assert fetcher.found(1) is None


def test_one_peer_that_is_spoilt_does_not_touch_another(fetcher, writer, incidents):
    second = Writer(writer.store, peer=2)
    fetcher.wish(1, NEWEST)
    fetcher.wish(2, NEWEST)
    writer.publish(weights(1, c=torch.full((7,), math.nan)), 10)
    good = second.publish(weights(2), 10, init_hash=identity(2).init_hash)
    until(lambda: fetcher.found(2) == good and incidents.total)
    assert fetcher.found(1) is None


def test_only_the_newest_files_of_a_peer_stay_on_the_machine(fetcher, folder, writer):
    fetcher.wish(1, NEWEST)
    made = []
    for update in range(10, 60, 10):
        made.append(writer.publish(weights(update), update))
        until(lambda: fetcher.found(1) == made[-1])
    assert set(folder.iterdir()) == files(folder, *made[-FILES_PER_PEER:])


def test_a_file_that_is_evicted_stays_readable_for_those_that_mapped_it(fetcher, folder, writer):
    fetcher.wish(1, NEWEST)
    first = writer.publish(weights(1), 1)
    until(lambda: fetcher.found(1))
    mapped = read(folder, first)
    for update in range(2, 3 + FILES_PER_PEER):
        newer = writer.publish(weights(update), update)
        until(lambda newer=newer: fetcher.found(1) == newer)
    assert not snapshot_file(folder, first.sha256).exists()
    assert all(torch.equal(mapped[name], value) for name, value in weights(1).items())


def test_closing_waits_for_a_transfer_only_so_long(store, writer, incidents, folder, quick_exchange, monkeypatch):
    hangs, began = threading.Event(), threading.Event()

    def download(manifest, path):
        began.set()
        hangs.wait(20)
        return False

    monkeypatch.setattr(store, "download", download)
    made = Fetcher(store, folder, [1], like(Template(weights(0), "float32")), "float32", identity(0), incidents)
    made.start()
    writer.publish(weights(1), 10)
    made.wish(1, NEWEST)
    assert began.wait(20)
    started = time.monotonic()
    made.close(0.1)
    assert time.monotonic() - started < 5
    hangs.set()


def test_a_fetcher_that_never_started_can_be_closed(store, folder, incidents):
    Fetcher(store, folder, [1], like(Template({}, "float32")), "float32", identity(0), incidents).close(1)
    assert incidents.total == 0


@pytest.mark.parametrize("wish", [Wish(update=20), Wish(reference=Reference(1, 10, 1))], ids=["update", "exact"])
def test_nobody_waits_twice_for_a_snapshot_that_was_refused(fetcher, writer, incidents, wish):
    bad = writer.snapshot(weights(1), 10, final=True, init_hash=identity(0).init_hash)
    writer.announce(bad, closed=True)
    fetcher.wish(1, wish)
    fetcher.wait(20)
    assert fetcher.hopeless(1)
    fetcher.wish(1, NEWEST)
    fetcher.wish(1, wish)
    began = time.monotonic()
    fetcher.wait(5)
    assert time.monotonic() - began < 4
    assert fetcher.hopeless(1)
    assert incidents.counts == {"init": 1}


def test_a_spoilt_latest_makes_no_wish_hopeless_since_its_owner_writes_it_anew(fetcher, writer, failing_objects):
    manifest = writer.snapshot(weights(1), 10)
    failing_objects.put(f"{RUN}/peers/1/latest.json", b"spoilt")
    fetcher.wish(1, Wish(update=10))
    look_again(failing_objects)
    assert not fetcher.hopeless(1)
    writer.announce(manifest)
    fetcher.wait(20)
    assert fetcher.found(1) == manifest


def test_trouble_with_one_wish_does_not_hold_up_the_next(fetcher, writer, monkeypatch):
    monkeypatch.setattr(fetcher_module, "POLL_SECONDS", 20.0)  # and so is the pause after trouble
    for update in (10, 20, 30):
        bad = {"a": torch.full((3, 4), math.nan)} if update < 30 else {}
        writer.publish(weights(update, **bad), update)
        fetcher.wish(1, Wish(update=update))
        fetcher.wait(15)
        assert fetcher.hopeless(1) == bool(bad)
    assert fetcher.found(1).update == 30
