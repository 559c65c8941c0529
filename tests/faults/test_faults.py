"""The faults themselves: they fire where and when they are armed, tell of it first, and do what their kind says."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from codistill.exchange import publisher
from codistill.exchange.checkpoint import peer_modules
from codistill.exchange.errors import StorageError
from codistill.exchange.objects import Objects
from codistill.exchange.snapshot import HostBuffer, Template
from codistill.workers import Workers, WorkersLost
from tests.faults.faults import FLIPS, KINDS, Faults, read_log
from tests.fixtures_peers import weights
from tests.fixtures_store import folder_objects  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
LATEST, MANIFEST = "run/peers/1/latest.json", "run/peers/1/1/8.json"
PAYLOAD, CLAIM = "run/peers/1/1/8-0123456789abcdef.safetensors", "run/peers/1/claims/1.json"
DATA = bytes(range(256)) * 4
PUTS = {"payload put": PAYLOAD, "manifest put": MANIFEST, "latest put": LATEST, "claim": CLAIM}
GETS = {"latest get": LATEST, "manifest get": MANIFEST}


@pytest.fixture
def faults(tmp_path):
    with Faults(tmp_path / "faults") as armed:
        yield armed


def test_the_call_that_is_named_fails_and_no_other_and_the_log_says_so(faults, folder_objects):  # noqa: F811
    faults.at("latest put", "fail", nth=2, times=2)
    faults.update = 7
    failed = []
    for call in range(1, 6):
        folder_objects.put(MANIFEST, DATA)
        try:
            folder_objects.put(LATEST, DATA)
        except StorageError:
            failed.append(call)
    assert failed == [2, 3]
    assert faults.fired() == [("latest put", "fail")] * 2
    assert [(line["call"], line["update"]) for line in read_log(faults._log)] == [(2, 7), (3, 7)]


def test_what_was_wrapped_is_the_products_own_again_afterwards(tmp_path):
    owners = [(Objects, "get"), (Objects, "create"), (HostBuffer, "fill"), (Template, "open"), (Workers, "share")]
    owners += [(publisher, "digest"), (peer_modules, "load")]
    before = [getattr(owner, name) for owner, name in owners]
    with Faults(tmp_path / "faults"):
        assert all(getattr(owner, name) is not one for (owner, name), one in zip(owners, before, strict=True))
    assert all(getattr(owner, name) is one for (owner, name), one in zip(owners, before, strict=True))


def test_nothing_counts_before_the_beginning(tmp_path, folder_objects):  # noqa: F811
    with Faults(tmp_path / "faults", counting=False) as faults:
        faults.at("latest put", "fail")
        folder_objects.put(LATEST, DATA)
        faults.begin()
        with pytest.raises(StorageError):
            folder_objects.put(LATEST, DATA)


@pytest.mark.parametrize("point", PUTS)
def test_every_write_is_known_by_its_key(faults, folder_objects, point):  # noqa: F811
    faults.at(point, "fail")
    for other in PUTS.keys() - {point}:
        folder_objects.put(PUTS[other], DATA)
    with pytest.raises(StorageError, match="on purpose"):
        folder_objects.create(PUTS[point], DATA)
    assert folder_objects.get(PUTS[point], limit=10**6) is None


@pytest.mark.parametrize("point", GETS)
def test_looking_at_ones_own_documents_is_not_fetching(tmp_path, folder_objects, point):  # noqa: F811
    folder_objects.put(GETS[point], DATA)
    for peer in (0, 1):
        with Faults(tmp_path / f"faults-{peer}", peer=peer) as faults:
            faults.at(point, "fail")
            if peer == 0:
                with pytest.raises(StorageError):
                    folder_objects.get(GETS[point], limit=10**6)
            assert folder_objects.get(GETS[point], limit=10**6) == DATA
            assert len(faults.fired()) == 1 - peer


def test_a_lost_answer_comes_after_the_deed(faults, folder_objects):  # noqa: F811
    faults.at("payload put", "lose")
    with pytest.raises(StorageError):
        folder_objects.create(PAYLOAD, DATA)
    assert folder_objects.get(PAYLOAD, limit=10**6) == DATA


@pytest.mark.parametrize("point", ["payload put", "manifest put", "latest put"])
@pytest.mark.parametrize("kind", ["truncate", "flip"])
def test_what_is_written_can_be_damaged(faults, folder_objects, point, kind):  # noqa: F811
    faults.at(point, kind)
    folder_objects.create(PUTS[point], DATA)
    assert_damaged(folder_objects.get(PUTS[point], limit=10**6), kind)


@pytest.mark.parametrize("point", GETS)
@pytest.mark.parametrize("kind", ["truncate", "flip"])
def test_what_is_read_can_be_damaged(faults, folder_objects, point, kind):  # noqa: F811
    folder_objects.put(GETS[point], DATA)
    faults.at(point, kind)
    assert_damaged(folder_objects.get(GETS[point], limit=10**6), kind)
    assert folder_objects.get(GETS[point], limit=10**6) == DATA


@pytest.mark.parametrize("kind", ["truncate", "flip"])
def test_a_damaged_download_has_the_digest_of_what_arrived(faults, folder_objects, tmp_path, kind):  # noqa: F811
    folder_objects.put(PAYLOAD, DATA)
    faults.at("payload get", kind)
    digest = folder_objects.download(PAYLOAD, tmp_path / "file", size=len(DATA))
    arrived = (tmp_path / "file").read_bytes()
    assert_damaged(arrived, kind)
    assert digest == hashlib.sha256(arrived).hexdigest()


def assert_damaged(data, kind):
    if kind == "truncate":
        assert DATA.startswith(data)
        assert len(data) < len(DATA)
    else:
        bits = sum((one ^ other).bit_count() for one, other in zip(data, DATA, strict=True))
        assert bits == FLIPS


def test_a_stale_read_sees_what_was_there_before(faults, folder_objects, tmp_path):  # noqa: F811
    faults.at("latest get", "stale", nth=2)
    faults.at("payload get", "stale", nth=2)
    for word in (b"old", b"new"):
        folder_objects.put(LATEST, word)
        folder_objects.put(PAYLOAD, word)
        assert folder_objects.get(LATEST, limit=10) == b"old"
        digest = folder_objects.download(PAYLOAD, tmp_path / "file", size=3)
        assert (digest, (tmp_path / "file").read_bytes()) == (hashlib.sha256(b"old").hexdigest(), b"old")
    assert folder_objects.get(LATEST, limit=10) == b"new"
    assert len(faults.fired()) == 2


def test_a_stale_write_is_acknowledged_and_lost(faults, folder_objects):  # noqa: F811
    faults.at("latest put", "stale", nth=2)
    for word in (b"old", b"new"):
        folder_objects.put(LATEST, word)
    assert folder_objects.get(LATEST, limit=10) == b"old"


def test_a_stale_answer_waits_until_there_is_one(faults, folder_objects):  # noqa: F811
    faults.at("latest get", "stale", times=5)
    folder_objects.put(LATEST, DATA)
    assert folder_objects.get(LATEST, limit=10**6) == DATA
    assert faults.fired() == []


def test_a_stall_ends_when_it_is_released(faults, folder_objects):  # noqa: F811
    faults.at("latest put", "stall", seconds=3600)
    thread = threading.Thread(target=folder_objects.put, args=(LATEST, DATA))
    thread.start()
    while not faults.fired():
        time.sleep(0.001)
    assert folder_objects.get(LATEST, limit=10**6) is None
    faults.release()
    thread.join()
    assert folder_objects.get(LATEST, limit=10**6) == DATA


KILL = """
import sys
from pathlib import Path
from codistill.exchange.objects import Objects
from tests.faults.faults import Faults
folder = Path(sys.argv[1])
with Faults(folder / "faults") as faults:
    faults.at("latest put", "kill", nth=2)
    for word in (b"old", b"new"):
        Objects(str(folder / "store")).put("run/peers/1/latest.json", word)
"""


def test_a_kill_is_told_of_before_it_happens(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILL, str(tmp_path)]
    killed = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert [(line["point"], line["kind"]) for line in read_log(tmp_path / "faults")] == [("latest put", "kill")]
    assert Objects(str(tmp_path / "store")).get("run/peers/1/latest.json", limit=10) == b"old"


def test_a_copy_fails_or_damages_the_weights(faults):
    state = weights(0)
    buffer = HostBuffer(state, "float32")
    faults.at("copy", "fail", nth=1)
    faults.at("copy", "flip", nth=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        buffer.fill(state)
    buffer.fill(state)
    copied = buffer.tensors()
    assert 1 <= sum(int((copied[name] != state[name]).sum()) for name in state) <= FLIPS + 1
    buffer.fill(state)
    assert all(torch.equal(copied[name], state[name]) for name in state)


def test_a_hash_fails_lies_or_repeats_itself(faults):
    for nth, kind in enumerate(("fail", "flip", "stale"), 2):
        faults.at("hash", kind, nth=nth)
    true = hashlib.sha256(DATA).hexdigest()
    assert publisher.digest(memoryview(DATA)) == true
    with pytest.raises(MemoryError):
        publisher.digest(memoryview(DATA))
    wrong = publisher.digest(memoryview(DATA))
    assert wrong != true
    assert publisher.digest(memoryview(b"other")) == wrong


def test_verifying_mapping_and_swapping_are_told_apart(faults, tmp_path):
    state = weights(0)
    buffer = HostBuffer(state, "float32")
    buffer.fill(state)
    path = tmp_path / "snapshot"
    path.write_bytes(buffer.view())
    template = Template(state, "float32")
    for point, error in (("verify", OSError), ("map", RuntimeError), ("swap", RuntimeError)):
        faults.at(point, "fail", nth=2)
        steps = {
            "verify": lambda: template.open(path),
            "map": lambda: template.open(path, verified=True),
            "swap": lambda: peer_modules.load(state, buffer.tensors()),
        }
        steps[point]()
        with pytest.raises(error, match="on purpose"):
            steps[point]()
    assert [point for point, _ in faults.fired()] == ["verify", "map", "swap"]


def test_one_worker_alone_never_fails_to_meet_itself(faults):
    faults.at("meeting", "fail")
    workers = Workers(timeout=1)
    assert workers.share([1]) == [1]
    workers.size = 2
    with pytest.raises(WorkersLost):
        workers.share([1])


def test_a_fault_that_does_not_exist_cannot_be_armed(faults):
    with pytest.raises(KeyError):
        faults.at("nowhere", "fail")
    with pytest.raises(AssertionError):
        faults.at("prune", "flip")
    assert all("fail" in kinds and "kill" in kinds for kinds in KINDS.values())
