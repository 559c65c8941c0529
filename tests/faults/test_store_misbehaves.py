"""The whole promise: a peer whose store misbehaves from its first to its last update trains as if it were alone."""

import math
from pathlib import Path

import pytest
import torch

from tests.faults.matrix import Places
from tests.faults.tiny_peer import PeerProcesses, Plan, Starter, wait_for
from tests.fixtures_store import s3_server  # noqa: F401

STORE = ("claim", "payload put", "manifest put", "latest put", "prune", "latest get", "manifest get", "payload get")
LOST = [(point, "stale") for point in STORE if "put" in point or point == "prune"]
MISBEHAVIOURS = {  # the faults, and by which causes they may be counted
    "every operation fails": ([(point, "fail") for point in STORE], {"storage"}),
    "every write is lost": (LOST, set()),
    "every payload is cut short": ([("payload get", "truncate")], {"hash"}),
    "every payload has flipped bits": ([("payload get", "flip")], {"hash"}),
    "every payload is spoilt as it is written": ([("payload put", "flip")], {"hash"}),
    "every latest.json is cut short": ([("latest get", "truncate")], {"format"}),
    "every latest.json has flipped bits": ([("latest get", "flip")], {"format", "run", "peer"}),
}
SECONDS = 60.0
ENOUGH, UPDATES = 5, 20  # faults, updates


@pytest.fixture(scope="module")
def starter():
    with Starter() as started:
        yield started


@pytest.mark.parametrize("store", ["folder", "s3"])
@pytest.mark.parametrize("misbehaviour", MISBEHAVIOURS)
def test_a_store_that_misbehaves_throughout_changes_no_bit(
    misbehaviour,
    store,
    s3_server,  # noqa: F811
    starter,
    tmp_path,
):
    faults, causes = MISBEHAVIOURS[misbehaviour]
    peers = [PeerProcesses(starter, plan) for plan in plans(faults, store, Places(s3_server), tmp_path)]
    for peer in peers:
        peer.start()
    assert wait_for(lambda: all(lasted(peer) for peer in peers), SECONDS), trouble(peers)
    (tmp_path / "stop").touch()
    assert wait_for(lambda: not any(peer.running() for peer in peers), SECONDS), trouble(peers)
    for peer in peers:
        assert peer.ended(), trouble(peers)
        assert {(line["point"], line["kind"]) for line in peer.fired()} <= set(faults)
        assert set(peer.causes()) <= causes
        assert bool(peer.causes()) == bool(causes), trouble(peers)
        assert_like_alone(peer, starter, tmp_path)


def lasted(peer):
    """Whether the store has misbehaved often, and the training had time to be hurt by it."""
    return len(peer.fired()) >= ENOUGH and len(peer.records()) > UPDATES


def plans(faults, store, places, folder):
    url, environment = places.options(store, folder)
    for peer in (0, 1):
        yield Plan(
            folder=str(folder / f"peer{peer}"),
            together=str(folder),
            options={"dir": url, "run_id": "run", "peer": peer, "interval": 2, "timeout": 1.0},
            seed=peer,
            faults=[{"point": point, "kind": kind, "times": math.inf} for point, kind in faults],
            begin="start",
            until="stop",
            seconds=2 * SECONDS,
            poll=0.05,
            heartbeat=0.1,
            env=environment,
        )


def assert_like_alone(peer, starter, tmp_path):
    """No peer was ever in use, and a run without a codistiller gives the same bits."""
    updates = [line for line in peer.records() if "update" in line]
    assert len(updates) == peer.end()["update"] > UPDATES - 1
    assert all(line["used"] == {} and line["penalty"] is None for line in updates)
    seed = peer.plan.seed
    folder = str(tmp_path / f"alone{seed}")
    plan = Plan(folder=folder, together=folder, options={}, seed=seed, updates=len(updates), pause=0)
    alone = PeerProcesses(starter, plan)
    alone.start()
    assert wait_for(lambda: not alone.running(), SECONDS)
    assert alone.ended(), alone.output()
    mine, theirs = peer.final(), alone.final()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert [line["loss"] for line in updates] == [line["loss"] for line in alone.records() if "update" in line]


def trouble(peers):
    return "\n".join(f"{Path(peer.plan.folder).name}: fired {len(peer.fired())}\n{peer.output()}" for peer in peers)
