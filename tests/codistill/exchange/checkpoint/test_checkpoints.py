"""The exchange by checkpoint as a whole: several workers, resuming in sync mode, trouble on this machine."""

import json
import logging
import threading
import time

import pytest
import torch
from torch import nn

from codistill import ConfigError
from codistill.exchange.checkpoint import peer_modules
from codistill.exchange.checkpoint.fetcher import Fetcher
from codistill.exchange.errors import StorageError
from codistill.exchange.membership import Membership
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
from tests.fixtures_peers import RUN, Writer, data_parallel, peers, quick_exchange, until  # noqa: F401

# ruff: noqa: F811

WORKER = """
import tempfile, time
from pathlib import Path
import torch
from codistill import CodistillConfig, Codistiller
from codistill.exchange.checkpoint import fetcher
from codistill.exchange.errors import StorageError
from codistill.exchange.store import RunStore

fetcher.POLL_SECONDS = 0.02
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
config = CodistillConfig(dir=FOLDER + "/store", run_id="run", interval=2, max_staleness=10**6, timeout=20.0)
codistiller = Codistiller(config, model=model, build_peer=lambda: torch.nn.Linear(3, 2), fingerprint="f" * 64,
                          save_dir=Path(FOLDER))
failures = []
download = RunStore.download

def failing(self, manifest, path):
    if rank == 1 and not allowed.exists():
        failures.append(manifest.update)
        raise StorageError("storage", "fails on purpose")
    return download(self, manifest, path)

RunStore.download = failing
allowed = Path(FOLDER) / "allowed"
history, ready = [], 0
for update in range(400):
    codistiller.begin_update(update, 1)
    guide = codistiller._exchange._fetcher
    history.append(sorted(used["update"] for used in codistiller.state_dict()["in_use"].values()))
    if rank == 0 and guide.found(1):
        ready += 1
    if ready == 20:  # worker 0 has had it for long, and nobody uses it
        allowed.touch()
    time.sleep(0.01)
    if update > 20 and update % 2 == 0 and codistiller._workers.minimum([len(history[-1])]) == [1]:
        break
answer = {"history": history, "failures": failures, "causes": dict(codistiller._incidents.counts),
          "folder": str(codistiller._exchange._folder.path), "peers": codistiller.metrics()["peers"]}
codistiller.close()
answer["left"] = [str(path) for path in Path(tempfile.gettempdir()).iterdir()]
"""

ALONE = """
from pathlib import Path
import torch
from codistill import CodistillConfig, Codistiller, ConfigError

model = torch.nn.Linear(3, 2)
config = CodistillConfig(dir=FOLDER + "/store", run_id="run", interval=2, timeout=5.0)
codistiller = Codistiller(config, model=model, build_peer=lambda: torch.nn.Linear(3, 2), fingerprint="f" * 64,
                          save_dir=Path(FOLDER))
try:
    codistiller.begin_update(0, 1)
except ConfigError as error:
    answer["line"] = str(error)
"""

LOST = """
import time
from pathlib import Path
import torch
from codistill import CodistillConfig, Codistiller, codistiller as facade, workers

facade.Workers = lambda timeout: workers.Workers(2.0)
model = torch.nn.Linear(3, 2)
config = CodistillConfig(dir=FOLDER + "/store", run_id="run", interval=2, timeout=5.0)
codistiller = Codistiller(config, model=model, build_peer=lambda: torch.nn.Linear(3, 2), fingerprint="f" * 64,
                          save_dir=Path(FOLDER))
for update in range(4):
    codistiller.begin_update(update, 1)
if rank == 0:
    for update in range(4, 20):
        codistiller.begin_update(update, 1)
    answer["causes"] = dict(codistiller._incidents.counts)
    answer["active"] = codistiller.active
else:
    time.sleep(4)
"""


RESUMED = """
from pathlib import Path
import torch
from codistill import CodistillConfig, Codistiller

def build():
    if rank == FAILING and not failed:
        failed.append(True)
        raise MemoryError("on purpose")
    return torch.nn.Linear(3, 2)

failed = []
config = CodistillConfig(dir=FOLDER + "/store", run_id="run", interval=2, timeout=5.0)
codistiller = Codistiller(config, model=torch.nn.Linear(3, 2), build_peer=build, fingerprint="f" * 64,
                          save_dir=Path(FOLDER))
codistiller.load_state_dict({"update": 12, "run_id": "run", "init_hash": "1" * 64, "in_use": IN_USE})
for update in range(12, 20):
    codistiller.begin_update(update, 1)
answer["causes"] = dict(codistiller._incidents.counts)
answer["peers"] = codistiller.metrics()["peers"]
codistiller.close()
"""


def linear(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 2).state_dict()


def test_workers_on_two_machines_swap_at_the_same_update_or_not_at_all(tmp_path):
    folders = [tmp_path / f"machine{rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    Writer(RunStore(Objects(str(tmp_path / "store")), RUN)).publish(linear(1), 10)
    answers = data_parallel(
        tmp_path,
        WORKER.replace("FOLDER", repr(str(tmp_path))),
        environments=[{"TMPDIR": str(folder)} for folder in folders],
    )
    first, second = answers
    assert first["history"] == second["history"]
    assert first["history"][0] == []
    assert first["history"][-1] == [10]
    assert first["peers"] == second["peers"] == 1
    assert second["failures"]
    assert second["causes"] == {"storage": len(second["failures"])}
    assert first["causes"] == {}
    assert first["folder"] != second["folder"]
    assert first["left"] == second["left"] == []


def test_when_a_worker_is_lost_the_exchange_ends_and_training_goes_on(tmp_path):
    Writer(RunStore(Objects(str(tmp_path / "store")), RUN)).announce(None)
    first, _ = data_parallel(tmp_path, LOST.replace("FOLDER", repr(str(tmp_path))))
    assert first == {"causes": {"workers": 1}, "active": False}


@pytest.mark.parametrize("failing", [0, 1])
def test_workers_that_resume_meet_as_often_though_one_alone_cannot_take_up_what_was_in_use(tmp_path, failing):
    manifest = Writer(RunStore(Objects(str(tmp_path / "store")), RUN)).publish(linear(1), 10)
    in_use = references(1, 10)
    in_use["1"]["sha256"] = manifest.sha256
    constants = f"FOLDER, FAILING, IN_USE = {str(tmp_path)!r}, {failing}, {in_use!r}\n"
    answers = data_parallel(tmp_path, constants + RESUMED)
    assert answers[failing]["causes"].pop("internal") == 1
    assert [answer["causes"] for answer in answers] == [{"gone": 1}, {}]
    assert answers[1 - failing]["peers"] == 1


def references(peer, in_use):
    return {
        "1": {"incarnation": 1, "update": in_use, "sequence": 1, "sha256": "a" * 64, "final": False, "accepted": in_use}
    }


def resumed(peers, update, in_use):
    """Peer 0 of a synchronous run with interval 2, resumed from a checkpoint of `update`."""
    peer = peers(0, sync=True, timeout=5.0)
    peer.update = update
    state = {"update": update, "run_id": RUN, "init_hash": "1" * 64, "in_use": references(1, in_use) if in_use else {}}
    peer.codistiller.load_state_dict(state)
    return peer


@pytest.fixture
def other(tmp_path, peers):
    """Peer 1, by hand: it has published updates 2 to 10, and pruned what came before 6."""
    writer = Writer(RunStore(Objects(str(tmp_path / "store")), RUN))
    model = peers(1).model.state_dict()
    for update in (2, 4, 6, 8, 10):
        manifest = writer.snapshot(model, update)
    writer.store.delete(1, writer.retained[:2])
    writer.retained = writer.retained[2:]
    writer.announce(manifest, resume_floor=8)
    return writer


@pytest.mark.parametrize(("update", "in_use", "gone"), [(5, 4, 4), (4, 2, 2), (2, None, 2), (1, None, 2), (0, None, 2)])
def test_a_synchronous_run_restored_below_the_floor_is_one_clear_line(peers, other, update, in_use, gone):
    peer = resumed(peers, update, in_use)
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        peer.codistiller.begin_update(update, epoch=1)
    assert str(caught.value) == (
        f"--codistill-sync: cannot resume from update {update}: the snapshot of peer 1 at update {gone} is gone; "
        "resume from the newest checkpoint, or start again with a new --codistill-run-id"
    )
    assert time.monotonic() - began < 4


def test_a_synchronous_run_is_restored_before_a_snapshot_that_was_never_stored(peers, tmp_path):
    writer = Writer(RunStore(Objects(str(tmp_path / "store")), RUN))
    model = peers(1).model.state_dict()
    manifests = {update: writer.snapshot(model, update) for update in (2, 6)}  # at 4 the store was out of reach
    writer.announce(manifests[6])
    peer = resumed(peers, 3, 2)
    state = {"update": 3, "run_id": RUN, "init_hash": "1" * 64, "in_use": references(1, 2)}
    state["in_use"]["1"]["sha256"] = manifests[2].sha256
    peer.codistiller.load_state_dict(state)
    peer.codistiller.config.timeout = 2.0
    peer.step(5)
    assert peer.causes() == {"late": 1}
    assert peer.codistiller.state_dict()["in_use"]["1"]["update"] == 6


def test_a_synchronous_run_does_not_ask_one_peer_after_the_other_in_a_store_that_does_not_answer(peers, monkeypatch):
    asked = []

    def slow(store, peer):
        if threading.current_thread() is threading.main_thread():
            asked.append(peer)
            time.sleep(0.2)
        raise StorageError("storage", "fails on purpose")

    peer = peers(0, sync=True, peers=16, timeout=0.5)
    monkeypatch.setattr(Fetcher, "wait", lambda fetcher, seconds: None)
    monkeypatch.setattr(RunStore, "latest", slow)
    monkeypatch.setattr(Membership, "join", lambda membership: None)
    peer.step()
    assert 0 < len(asked) < 6


def test_a_store_that_fails_while_a_synchronous_run_is_restored_is_not_taken_for_one_that_lost_it(
    peers, other, monkeypatch
):
    def failing(store, peer, reference):
        raise StorageError("storage", "fails on purpose")

    peer = resumed(peers, 8, 8)
    peer.codistiller.config.timeout = 0.3
    monkeypatch.setattr(RunStore, "manifest", failing)
    with pytest.raises(ConfigError) as caught:
        peer.codistiller.begin_update(8, epoch=1)
    assert str(caught.value) == (
        "--codistill-sync: cannot resume from update 8: the snapshot of peer 1 at update 8 was not to be had in time; "
        "start again when the store answers"
    )


def test_what_a_synchronous_peer_does_not_get_in_time_is_told_and_done_without(peers, caplog):
    peer = peers(0, sync=True, timeout=0.3)
    with caplog.at_level(logging.WARNING, "codistill"):
        peer.step(5)
    assert peer.causes() == {"late": 2}
    assert "no snapshot of peer 1 at update 2; going on without" in caplog.text
    assert not peer.codistiller.active


def test_the_resume_floor_is_the_boundary_whose_snapshots_a_checkpoint_uses(peers, tmp_path):
    peer = peers(0, interval=10)
    peer.step()
    latest = tmp_path / "store" / RUN / "peers" / "0" / "latest.json"
    until(latest.exists)

    def told():
        return json.loads(latest.read_text())["resume_floor"]

    for saved, floor in ((0, 0), (1, 0), (10, 0), (11, 10), (20, 10), (25, 20)):
        peer.codistiller.checkpoint_saved(saved)
        until(lambda floor=floor: told() == floor)


def test_the_resume_floor_is_lower_while_a_peer_that_was_late_is_known_by_an_older_snapshot(peers, tmp_path):
    writer = Writer(RunStore(Objects(str(tmp_path / "store")), RUN))
    writer.publish(peers(1).model.state_dict(), 2)
    peer = peers(0, sync=True, timeout=1.5, max_staleness=4)
    latest = tmp_path / "store" / RUN / "peers" / "0" / "latest.json"

    def told(key):
        return json.loads(latest.read_text())[key]

    for update, floor in ((4, 2), (6, 2), (9, 8)):  # after update 6 the snapshot of update 2 is too stale
        peer.step(update - peer.update)
        peer.codistiller.checkpoint_saved(update)
        before = told("heartbeat")
        until(lambda before=before: told("heartbeat") > before + 1)
        assert told("resume_floor") == floor
    assert peer.causes() == {"late": 3}


def test_a_module_that_cannot_be_built_leaves_that_peer_out(peers):
    first, second = peers(0), peers(1)

    def no_room():
        raise MemoryError("no room")

    first.codistiller._build_peer = no_room
    second.step(3)
    first.step_until(lambda: first.causes())
    first.step(4)
    assert set(first.causes()) == {"internal"}
    assert not first.codistiller.active
    assert first.metrics()["peers"] == 0


def test_what_one_worker_alone_cannot_do_ends_all_workers_with_a_line(tmp_path):
    code = f"FOLDER = {str(tmp_path)!r}\n{ALONE}"
    first, second = data_parallel(tmp_path, code, environments=[{}, {"CODISTILL_KEY": "short"}])
    assert first["line"] == "another worker of this peer could not join the run; its message says why"
    assert second["line"].startswith("CODISTILL_KEY: a key of 5 bytes; ")


def test_a_swap_that_fails_half_way_goes_back_to_the_last_good_snapshot(peers, monkeypatch):
    first, second = peers(0), peers(1)
    first.step_until(lambda: second.step() or first.codistiller.active)
    before = first.codistiller.state_dict()["in_use"]["1"]
    module = first.codistiller._exchange._modules._modules[1]
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    whole, failed, first_weight = peer_modules.load, [], next(iter(module.state_dict().values()))

    def half_way(state, tensors):
        touched = next(iter(state.values()))
        if not failed and touched.data_ptr() == first_weight.data_ptr():
            failed.append(True)
            touched.fill_(7.0)
            raise RuntimeError("on purpose")
        whole(state, tensors)

    monkeypatch.setattr(peer_modules, "load", half_way)
    first.step_until(lambda: second.step() or failed)
    assert first.causes() == {"internal": 1}
    assert first.codistiller.state_dict()["in_use"]["1"] == before
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    first.step_until(lambda: second.step() or first.codistiller.state_dict()["in_use"]["1"] != before)
    assert first.causes() == {"internal": 1}


def test_a_snapshot_that_cannot_be_read_on_this_machine_is_left_out(peers):
    first, second = peers(0), peers(1)
    second.step(3)
    first.step()
    exchange = first.codistiller._exchange
    manifest = until(lambda: exchange._fetcher.found(1))
    file = exchange._folder.path / f"{manifest.sha256}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    first.step_until(lambda: first.causes())
    first.step(2)
    assert set(first.causes()) == {"disk"}
    second.step(4)
    first.step_until(lambda: first.codistiller.active)


def test_a_temporary_folder_that_cannot_be_used_is_told_in_one_line(peers, quick_exchange, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(quick_exchange / "missing"))
    with pytest.raises(ConfigError) as caught:
        peers(0).step()
    assert str(caught.value).endswith(": No such file or directory; name a writable folder with TMPDIR")
    assert "\n" not in str(caught.value)
