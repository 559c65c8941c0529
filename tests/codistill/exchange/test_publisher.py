"""Publishing in the background: in which order, what is skipped and pruned, and that trouble stays behind."""

import threading
import time

import pytest
import torch

from codistill.exchange import publisher as publisher_module
from codistill.exchange.errors import StorageError
from codistill.exchange.manifest import Reference
from codistill.exchange.membership import Membership
from codistill.exchange.snapshot import Template
from codistill.exchange.store import RunStore
from codistill.meters import Incidents
from tests.fixtures_peers import (  # noqa: F401
    NOWHERE,
    RUN,
    Writer,
    identity,
    publishers,
    quick_exchange,
    until,
    weights,
)
from tests.fixtures_store import FailingObjects, failing_objects, memory_objects  # noqa: F401

# ruff: noqa: F811


class Recording(FailingObjects):
    """Keeps the names written and deleted, in order, without heartbeats; `gate` holds back payloads while it is set."""

    def __init__(self, inner):
        super().__init__(inner)
        self.names = []
        self.gate = threading.Event()
        self.held = threading.Event()

    def create(self, key, data):
        if key.endswith(".safetensors") and self.gate.is_set():
            self.held.set()
            while self.gate.is_set():
                time.sleep(0.005)
        created = super().create(key, data)
        self.names.append(f"create {key}")
        return created

    def put(self, key, data):
        super().put(key, data)
        self.names.append(f"put {key}")

    def delete(self, keys):
        keys = list(keys)
        super().delete(keys)
        self.names += [f"delete {key}" for key in keys]

    def snapshots(self):
        return [name for name in self.names if "/claims/" not in name and "run.json" not in name]


@pytest.fixture
def objects(memory_objects):
    recording = Recording(memory_objects)
    yield recording
    recording.gate.clear()


def publish(publisher, update, seed=None, final=False):
    """Publish and wait until it is done."""
    state = weights(update if seed is None else seed)
    assert publisher.publish(state, update=update, epoch=1, metrics={"alpha": 0.5}, final=final)
    assert publisher.flush(20)


def latest(objects):
    return RunStore(objects, RUN).latest(0)


def retained(objects):
    return [reference.update for reference in latest(objects).retained]


def held_back(objects, publisher):
    """A publication of update 2 that is under way until the gate opens."""
    objects.gate.set()
    assert publisher.publish(weights(2), update=2, epoch=1, metrics={})
    assert objects.held.wait(20)


def test_a_snapshot_can_be_read_back_with_all_that_its_manifest_says(publishers, objects, tmp_path):
    publisher = publishers(objects)
    state = weights(7)
    assert publisher.publish(state, update=7, epoch=3, metrics={"loss": 2.5, "bad": float("nan")})
    assert publisher.flush(20)
    store = RunStore(objects, RUN)
    found = store.latest(0)
    manifest = found.manifest
    assert (manifest.run, manifest.peer, manifest.incarnation, manifest.sequence) == (RUN, 0, 1, 1)
    assert (manifest.update, manifest.epoch, manifest.final, manifest.metrics) == (7, 3, False, {"loss": 2.5})
    assert (manifest.fingerprint, manifest.init_hash) == (identity().fingerprint, identity().init_hash)
    assert store.manifest(0, Reference(1, 7, 1)) == manifest
    assert store.download(manifest, tmp_path / "payload")
    read = Template(state, "float32").open(tmp_path / "payload")
    assert all(torch.equal(read[name], value) for name, value in state.items())
    assert publisher.sent == manifest.bytes


def test_the_payload_stands_before_its_manifest_and_both_before_latest(publishers, objects):
    publisher = publishers(objects)
    until(lambda: latest(objects))
    publish(publisher, 2)
    payload = latest(objects).manifest.payload
    order = objects.snapshots()
    first = [order.index(f"create {RUN}/peers/0/1/{name}") for name in (payload, "2.json")]
    assert first == sorted(first)
    assert order[first[1] + 1] == f"put {RUN}/peers/0/latest.json"


def test_the_heartbeat_grows_while_nothing_is_published(publishers, objects):
    publishers(objects)
    first = until(lambda: latest(objects)).heartbeat
    until(lambda: latest(objects).heartbeat > first + 2)
    assert latest(objects).manifest is None


def test_the_weights_are_those_of_the_call_though_training_goes_on(publishers, objects, tmp_path):
    publisher = publishers(objects)
    state = weights(1)
    wanted = {name: value.clone() for name, value in state.items()}
    objects.gate.set()
    assert publisher.publish(state, update=2, epoch=1, metrics={})
    for value in state.values():
        value.zero_()
    objects.gate.clear()
    assert publisher.flush(20)
    assert RunStore(objects, RUN).download(latest(objects).manifest, tmp_path / "payload")
    read = Template(state, "float32").open(tmp_path / "payload")
    assert all(torch.equal(read[name], value) for name, value in wanted.items())


def test_while_the_buffer_is_busy_publications_are_skipped_and_counted(publishers, objects):
    publisher = publishers(objects)
    held_back(objects, publisher)
    assert not publisher.publish(weights(4), update=4, epoch=1, metrics={})
    assert not publisher.publish(weights(6), update=6, epoch=1, metrics={})
    assert not publisher.flush(0.01)
    objects.gate.clear()
    assert publisher.flush(20)
    publish(publisher, 8)
    assert publisher.skipped == 2
    assert retained(objects) == [2, 8]


def test_the_newest_snapshots_are_kept_and_what_is_older_leaves_the_store(publishers, objects):
    publisher = publishers(objects, keep=2)
    for update in (2, 4, 6, 8):
        publish(publisher, update)
    assert retained(objects) == [6, 8]
    store = RunStore(objects, RUN)
    assert [store.manifest(0, Reference(1, u, u // 2)) is not None for u in (2, 4, 6, 8)] == [False, False, True, True]
    deleted = [name for name in objects.names if name.startswith("delete")]
    assert [name.endswith(".json") for name in deleted] == [False, True] * 2  # each payload before its manifest
    assert {name.split("/")[-1].split("-")[0].split(".")[0] for name in deleted} == {"2", "4"}


def test_latest_stops_naming_a_snapshot_before_it_is_deleted(publishers, objects):
    publisher = publishers(objects, keep=2)
    for update in (2, 4):
        publish(publisher, update)
    objects.fail_at("delete")
    publish(publisher, 6)
    assert objects.fired == ["delete"]
    assert retained(objects) == [4, 6]


def test_in_sync_mode_nothing_from_the_lowest_floor_on_is_pruned(publishers, objects):
    floor = [0]
    publisher = publishers(objects, keep=2, sync=True, lowest_floor=lambda: floor[0])
    for update in range(2, 12, 2):
        publish(publisher, update)
    assert retained(objects) == [2, 4, 6, 8, 10]
    floor[0] = 6
    publish(publisher, 12)
    assert retained(objects) == [6, 8, 10, 12]
    floor[0] = 1000
    publish(publisher, 14)
    assert retained(objects) == [12, 14]


def test_the_resume_floor_is_told_with_the_next_heartbeat(publishers, objects):
    publisher = publishers(objects, floor=30)
    assert until(lambda: latest(objects)).resume_floor == 30
    publisher.set_floor(70)
    until(lambda: latest(objects).resume_floor == 70)


@pytest.mark.parametrize("operation", ["create", "put", "delete"])
def test_when_the_store_fails_it_is_an_incident_and_the_next_publication_works(publishers, objects, operation):
    incidents = Incidents(fatal=False)
    publisher = publishers(objects, keep=2, incidents=incidents)
    until(lambda: latest(objects))
    for update in (2, 4):
        publish(publisher, update)
    objects.fail_at(operation)
    publish(publisher, 6)
    publish(publisher, 8)
    assert objects.fired == [operation]
    assert incidents.counts == {"storage": 1}
    assert latest(objects).manifest.update == 8
    assert publisher.skipped == 0
    written = [name for name in objects.snapshots() if name.startswith("create") and ".json" in name]
    deleted = [name.replace("delete", "create") for name in objects.names if name.startswith("delete")]
    assert sum(name not in deleted for name in set(written)) == 2  # what could not be deleted at first is gone too


@pytest.mark.parametrize("operation", ["create", "put"])
def test_a_publication_that_the_store_did_not_take_is_tried_again_until_it_does(publishers, objects, operation):
    incidents = Incidents(fatal=False)
    publisher = publishers(objects, incidents=incidents)
    until(lambda: latest(objects))
    publish(publisher, 2)
    for nth in (1, 2, 3):
        objects.fail_at(operation, nth)
    publish(publisher, 4)
    assert objects.fired == [operation] * 3
    assert incidents.counts == {"storage": 3}
    assert retained(objects) == [2, 4]
    payloads = [name for name in objects.snapshots() if ".safetensors" in name and "/4-" in name]
    assert len(set(payloads)) == 1  # every attempt under the same name


@pytest.mark.parametrize("nth", [1, 2], ids=["payload", "manifest"])
def test_an_attempt_whose_answer_was_lost_is_completed_by_the_next(publishers, objects, nth):
    incidents = Incidents(fatal=False)
    publisher = publishers(objects, incidents=incidents)
    until(lambda: latest(objects))
    objects.fail_at("create", nth, answer_lost=True)
    publish(publisher, 2)
    assert (objects.fired, incidents.counts) == (["create"], {"storage": 1})
    assert (latest(objects).manifest.update, retained(objects)) == (2, [2])


def test_a_publication_that_waits_for_its_next_attempt_makes_room_for_newer_weights(publishers, objects, monkeypatch):
    monkeypatch.setattr(publisher_module, "RETRY_SECONDS", 600.0)
    publisher = publishers(objects)
    until(lambda: latest(objects))
    objects.fail_at("create", 2)  # the manifest: its payload is on the store by then
    assert publisher.publish(weights(2), update=2, epoch=1, metrics={})
    until(lambda: objects.fired)
    until(lambda: not publisher._storing)
    assert not publisher.flush(0.01)
    publish(publisher, 4)
    assert (publisher.skipped, retained(objects)) == (0, [4])
    [payload] = [name for name in objects.snapshots() if name.startswith("create") and "/2-" in name]
    assert payload.replace("create", "delete") in objects.names  # nobody needs what the first attempt left


def test_closing_waits_for_no_further_attempt_unless_training_has_ended(publishers, objects, monkeypatch):
    monkeypatch.setattr(publisher_module, "RETRY_SECONDS", 600.0)
    publisher = publishers(objects)
    until(lambda: latest(objects))
    objects.fail_at("create")
    assert publisher.publish(weights(2), update=2, epoch=1, metrics={})
    until(lambda: objects.fired)
    began = time.monotonic()
    publisher.close(60, ended=False)
    assert time.monotonic() - began < 30
    assert latest(objects).manifest is None


def test_the_last_snapshot_of_an_ended_training_is_tried_again(publishers, objects):
    publisher = publishers(objects)
    until(lambda: latest(objects))
    objects.fail_at("create")
    objects.fail_at("create", 2)
    assert publisher.publish(weights(2), update=2, epoch=1, metrics={}, final=True)
    publisher.close(60, ended=True)
    assert objects.fired == ["create"] * 2
    assert (latest(objects).manifest.final, latest(objects).closed) == (True, True)


def test_a_word_of_which_the_answer_was_lost_is_never_taken_back(publishers, objects):
    publisher = publishers(objects)
    publish(publisher, 2)
    seen = []
    put = objects.inner.put
    objects.inner.put = lambda key, data: (put(key, data), seen.append(latest(objects).manifest.update))
    objects.fail_at("put", answer_lost=True)
    publish(publisher, 4)
    until(lambda: len(seen) > 10)  # heartbeats
    assert objects.fired == ["put"]
    assert seen == sorted(seen)
    assert retained(objects) == [2, 4]


def test_weights_of_an_update_that_waits_for_its_next_attempt_are_published_once_and_as_final(
    publishers, objects, monkeypatch
):
    monkeypatch.setattr(publisher_module, "RETRY_SECONDS", 0.3)
    publisher = publishers(objects)
    until(lambda: latest(objects))
    objects.fail_at("create", 2)  # the manifest
    assert publisher.publish(weights(2), update=2, epoch=1, metrics={})
    until(lambda: objects.fired and not publisher._storing)
    publish(publisher, 2, seed=9, final=True)
    assert (latest(objects).manifest.final, retained(objects)) == (True, [2])
    assert RunStore(objects, RUN).manifest(0, latest(objects).manifest.reference) is not None


def test_the_last_snapshot_waits_for_one_that_is_being_stored(publishers, objects):
    publisher = publishers(objects)
    until(lambda: latest(objects))
    held_back(objects, publisher)
    opening = threading.Timer(0.2, objects.gate.clear)
    opening.start()
    assert publisher.publish(weights(4), update=4, epoch=1, metrics={}, final=True, patience=20)
    opening.join()
    assert publisher.flush(20)
    assert (latest(objects).manifest.update, publisher.skipped) == (4, 0)


class Hesitant(threading.Condition):
    """The publishing thread pauses whenever it has let go of it, so that whoever waits goes first."""

    def __exit__(self, *error):
        super().__exit__(*error)
        if threading.current_thread().name == "codistill_publisher":
            time.sleep(0.05)


def test_weights_that_were_being_stored_when_training_ended_are_final_in_the_end(publishers, objects):
    publisher = publishers(objects)
    publisher._changed.__class__ = Hesitant
    until(lambda: latest(objects))
    held_back(objects, publisher)
    opening = threading.Timer(0.2, objects.gate.clear)
    opening.start()
    assert publisher.publish(weights(2), update=2, epoch=1, metrics={}, final=True, patience=20)
    opening.join()
    assert publisher.flush(20)
    assert (latest(objects).manifest.update, latest(objects).manifest.final) == (2, True)


def test_a_spoilt_manifest_of_an_earlier_start_does_not_keep_ours_back(publishers, objects):
    first = publishers(objects, sync=True)
    publish(first, 2)
    first.close(5, ended=False)
    objects.inner.put(f"{RUN}/peers/0/1/2.json", b"rubbish")
    incidents = Incidents(fatal=False)
    second = publishers(objects, sync=True, incidents=incidents)
    publish(second, 2)
    assert latest(objects).manifest.incarnation == 2
    assert incidents.counts == {"format": 1}


def test_what_a_killed_predecessor_left_half_written_is_swept_and_what_is_in_use_kept(publishers, objects):
    first = publishers(objects, keep=2)
    for update in (2, 4):
        publish(first, update)
    first.close(5, ended=False)
    orphans = [f"{RUN}/peers/0/1/6-{'e' * 16}.safetensors", f"{RUN}/peers/0/1/5.json"]
    for key in orphans:
        objects.inner.put(key, b"half-written")
    others = f"{RUN}/peers/1/1/6-{'e' * 16}.safetensors"
    objects.inner.put(others, b"of another peer")
    second = publishers(objects, keep=3)
    publish(second, 6)
    until(lambda: not any(map(objects.exists, orphans)))
    assert objects.exists(others)
    kept = latest(objects).retained
    assert [reference.update for reference in kept] == [2, 4, 6]
    for reference in kept:
        manifest = RunStore(objects, RUN).manifest(0, reference)
        assert objects.exists(f"{RUN}/peers/0/{reference.incarnation}/{manifest.payload}")


def test_what_a_start_left_is_swept_though_the_one_after_it_published_nothing(publishers, objects):
    orphan = f"{RUN}/peers/0/1/6-{'e' * 16}.safetensors"
    for _ in range(2):
        publishers(objects).close(5, ended=False)
        objects.inner.put(orphan, b"half-written")
    publish(publishers(objects), 6)
    until(lambda: not objects.exists(orphan))


def test_weights_that_cannot_be_copied_are_an_incident(publishers, objects):
    incidents = Incidents(fatal=False)
    publisher = publishers(objects, incidents=incidents)
    publish(publisher, 2)
    assert not publisher.publish({**weights(4), "a": torch.zeros(2)}, update=4, epoch=1, metrics={})
    assert incidents.counts == {"copy": 1}
    publish(publisher, 6)
    assert retained(objects) == [2, 6]


def test_the_same_update_is_published_once(publishers, objects):
    publisher = publishers(objects)
    publish(publisher, 2)
    before = latest(objects).manifest
    publish(publisher, 2, seed=9)
    assert (latest(objects).manifest, retained(objects)) == (before, [2])


def test_a_store_that_cannot_be_reached_at_the_start_is_joined_later(publishers, objects):
    incidents = Incidents(fatal=False)
    for nth in (1, 2, 3):
        objects.fail_at("create", nth)
    publisher = publishers(objects, incidents=incidents)
    publisher.publish(weights(2), update=2, epoch=1, metrics={})
    publisher.flush(20)
    publish(publisher, 4)
    until(lambda: latest(objects))
    assert objects.fired == ["create"] * 3
    assert set(incidents.counts) == {"storage"}
    assert latest(objects).incarnation >= 1


def test_even_a_fault_of_our_own_is_only_an_incident(publishers, objects):
    def on_copy(update, views):
        if update == 2:
            raise ZeroDivisionError("on purpose")
        return {"mean": views["b"].float().mean().item()}

    incidents = Incidents(fatal=False)
    publisher = publishers(objects, incidents=incidents, on_copy=on_copy)
    publish(publisher, 2)
    assert publisher.publish(weights(4, b=torch.ones(5, dtype=torch.int64)), update=4, epoch=1, metrics={"loss": 2.0})
    assert publisher.flush(20)
    assert incidents.counts == {"internal": 1}
    assert retained(objects) == [2, 4]
    assert latest(objects).manifest.metrics == {"loss": 2.0, "mean": 1.0}


def test_a_superseded_process_stops_publishing_and_says_so_once(publishers, objects):
    incidents = Incidents(fatal=False)
    old = publishers(objects, incidents=incidents)
    publish(old, 2)
    new = publishers(objects)
    until(lambda: latest(objects).incarnation == 2)
    until(lambda: incidents.counts == {"superseded": 1})
    assert not old.publish(weights(4), update=4, epoch=1, metrics={})
    assert old.skipped == 0  # which would say that the store is too slow
    publish(new, 6)
    old.close(5, ended=True)
    found = latest(objects)
    assert (found.incarnation, found.manifest.update, found.closed) == (2, 6, False)
    assert retained(objects) == [2, 6]


def test_a_restart_takes_over_what_was_left_and_prunes_it_in_time(publishers, objects):
    first = publishers(objects, keep=2)
    for update in (2, 4):
        publish(first, update)
    first.close(5, ended=False)
    before = latest(objects)
    second = publishers(objects, keep=2)
    until(lambda: latest(objects).incarnation == 2)
    assert latest(objects).manifest == before.manifest
    publish(second, 4)
    assert latest(objects).retained == (Reference(1, 4, 2), Reference(2, 4, 1))


def test_other_terms_found_in_the_background_end_publishing_with_one_incident(objects, publishers):
    RunStore(objects, RUN).agree({"interval": 3})
    incidents = Incidents(fatal=False)
    publisher = publishers(objects, incidents=incidents)
    until(lambda: incidents.counts == {"terms": 1})
    assert not publisher.publish(weights(2), update=2, epoch=1, metrics={})
    publisher.close(5, ended=True)
    assert latest(objects) is None


def test_a_restart_in_sync_mode_that_comes_out_differently_is_reported(publishers, objects):
    incidents = Incidents(fatal=False)
    first = publishers(objects, sync=True)
    publish(first, 2, seed=1)
    publish(first, 4, seed=2)
    first.close(5, ended=False)
    second = publishers(objects, sync=True, incidents=incidents)
    publish(second, 2, seed=1)
    assert incidents.counts == {}
    publish(second, 4, seed=3)
    assert incidents.counts == {"not-reproduced": 1}
    assert retained(objects) == [2, 4, 2, 4]


@pytest.mark.parametrize("ended", [True, False])
def test_only_a_normal_end_is_told(publishers, objects, ended):
    publisher = publishers(objects)
    publish(publisher, 2, final=ended)
    publisher.close(5, ended=ended)
    found = latest(objects)
    assert (found.closed, found.manifest.final) == (ended, ended)
    publisher.close(5, ended=ended)
    assert not publisher.publish(weights(4), update=4, epoch=1, metrics={})


def test_what_is_under_way_is_stored_before_the_end(publishers, objects):
    publisher = publishers(objects)
    held_back(objects, publisher)
    threading.Timer(0.2, objects.gate.clear).start()
    publisher.close(20, ended=True)
    assert retained(objects) == [2]
    assert latest(objects).closed


def test_closing_does_not_wait_for_a_snapshot_that_does_not_get_stored(publishers, objects):
    incidents = Incidents(fatal=False)
    publisher = publishers(objects, incidents=incidents)
    held_back(objects, publisher)
    began = time.monotonic()
    publisher.close(0.2, ended=True)
    assert time.monotonic() - began < 2
    assert incidents.counts == {"storage": 1}


def test_closing_does_not_wait_for_a_heartbeat_that_hangs(publishers, objects):
    hangs = threading.Event()

    class Hanging(Recording):
        def put(self, key, data):
            while hangs.is_set():
                time.sleep(0.005)
            super().put(key, data)

    store = Hanging(objects)
    publisher = publishers(store)
    until(lambda: latest(objects))
    hangs.set()
    time.sleep(0.1)
    ending = threading.Thread(target=publisher.close, args=(0.2,), kwargs={"ended": True})
    ending.start()
    ending.join(3)
    late = ending.is_alive()
    hangs.clear()
    ending.join()
    assert not late


def test_nothing_is_written_by_a_process_whose_number_was_refused(objects, quick_exchange):
    store = RunStore(objects, RUN)
    Membership(store, 0, "b" * 64, {}, NOWHERE).join(0.1)
    Writer(store, peer=0).announce(None, token="b" * 64)
    before = list(objects.names)
    objects.fail_at("create")
    with pytest.raises(StorageError):
        Membership(store, 0, "a" * 64, {}, NOWHERE).join(0.1)
    assert objects.names == before
