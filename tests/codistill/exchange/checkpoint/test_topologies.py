"""Peers that learn from a few of the others: whom, how that changes as peers come and go, and what it costs."""

import json
import time

import pytest
import torch

from codistill.exchange.checkpoint import fetcher, joining, peer_modules
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
from codistill.topology import Topology
from tests.codistill.exchange.checkpoint.test_checkpoints import linear
from tests.fixtures_peers import (  # noqa: F401
    RUN,
    Writer,
    data_parallel,
    peers,
    quick_exchange,
    train_side_by_side,
    until,
)

# ruff: noqa: F811


@pytest.fixture(autouse=True)
def two_seconds_of_silence(monkeypatch, quick_exchange):
    """Enough for a busy machine to keep its heartbeats."""
    monkeypatch.setattr(fetcher, "SILENCE", 200)


def used(peer):
    return sorted(map(int, peer.codistiller.state_dict()["in_use"]))


def train_until(together, condition, seconds=30.0):
    """Train peers of one process, a little slower than the background works."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [(used(peer), peer.causes()) for peer in together]
        for peer in together:
            peer.step()
        time.sleep(0.01)


def train(together, updates):
    goal = together[0].update + updates
    train_until(together, lambda: together[0].update >= goal)


def of(together, wanted):
    """Whether each peer uses exactly whom it should."""
    return [used(peer) for peer in together] == [[number] for number in wanted]


@pytest.fixture
def ring(peers):
    """Four peers, each using the one before it."""
    together = [peers(number, peers=4, topology="ring") for number in range(4)]
    train_until(together, lambda: of(together, [3, 0, 1, 2]))
    return together


def test_on_a_ring_each_peer_uses_exactly_the_one_before(ring):
    for _ in range(10):
        train(ring, 2)
        assert of(ring, [3, 0, 1, 2])
    for peer in ring:
        assert peer.metrics()["peers"] == 1
        assert peer.metrics()["received"] > 5 * 400
        assert peer.built <= 2  # the template's, and the module of the one that is learnt from
        assert peer.causes() == {}


def test_a_new_neighbour_that_cannot_be_loaded_leaves_the_former_one_in_use(ring, monkeypatch):
    ring[2].codistiller.close()
    alive = [ring[0], ring[1], ring[3]]
    modules = ring[3].codistiller._exchange._modules
    [module] = modules._modules.values()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    whole, failed = peer_modules.load, []

    def half_way(state, tensors):
        if failed or module.embed.weight.data_ptr() != next(iter(state.values())).data_ptr():
            whole(state, tensors)
        elif 1 in modules._modules:  # the new neighbour has the module now
            failed.append(True)
            module.embed.weight.fill_(7.0)
            raise RuntimeError("on purpose")
        else:
            whole(state, tensors)
            weights.update({name: value.clone() for name, value in module.state_dict().items()})

    monkeypatch.setattr(peer_modules, "load", half_way)
    train_until(alive, lambda: failed)
    assert used(ring[3]) == [2]
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert ring[3].causes() == {"internal": 1}
    train_until(alive, lambda: used(ring[3]) == [1])
    assert list(modules._modules.values()) == [module]
    assert ring[3].causes() == {"internal": 1}


def test_the_ring_closes_over_a_dead_peer_and_opens_for_it_when_it_is_back(ring, peers):
    ring[2].codistiller.close()  # without a word, as when killed
    alive = [ring[0], ring[1], ring[3]]
    train_until(alive, lambda: of(alive, [3, 0, 1]))
    train(alive, 10)
    assert of(alive, [3, 0, 1])
    ring[2] = peers(2, peers=4, topology="ring")
    train_until(ring, lambda: of(ring, [3, 0, 1, 2]))
    assert ring[3].codistiller.state_dict()["in_use"]["2"]["incarnation"] in (1, 2)
    train_until(ring, lambda: ring[3].codistiller.state_dict()["in_use"]["2"]["incarnation"] == 2)
    assert all(peer.causes() == {} for peer in ring)
    assert len(ring[3].codistiller._exchange._modules._modules) == 1


def test_a_peer_that_joins_late_is_taken_into_the_ring(peers):
    early = [peers(number, peers=4, topology="ring") for number in (0, 1, 3)]
    train_until(early, lambda: of(early, [3, 0, 1]))
    late = peers(2, peers=4, topology="ring")
    together = [early[0], early[1], late, early[2]]
    train_until(together, lambda: of(together, [3, 0, 1, 2]))
    assert all(peer.causes() == {} for peer in together)


def test_who_ended_is_learnt_from_while_nobody_else_is_there_and_never_goes_stale(peers):
    first, second, third = together = [peers(n, peers=3, topology="ring", max_staleness=4) for n in range(3)]
    train_until(together, lambda: of(together, [2, 0, 1]))
    second.codistiller.finish(second.update)
    train_until([first, third], lambda: of([first, third], [2, 0]))  # one that trains comes before one that ended
    first.codistiller.finish(first.update)
    train_until([third], lambda: of([third], [1]))
    train([third], 20)
    assert third.metrics()["peers"] == 1
    assert third.metrics()["staleness"] == 0
    assert third.causes() == {}


def test_a_peer_whose_snapshots_are_refused_is_passed_over(peers):
    together = [peers(number, peers=3, topology="ring", seed=number % 2) for number in range(3)]  # 0 and 2 start alike
    train_until(together, lambda: of(together, [1, 0, 1]))
    assert together[0].causes().keys() == {"init"}


def test_a_draw_of_two_is_used_in_its_interval_and_no_other(peers, monkeypatch):
    monkeypatch.setattr(fetcher, "SILENCE", 10**6)  # a slow machine must not change a draw
    together = [peers(number, peers=5, topology="random-2", interval=4) for number in range(5)]
    train(together, 9)
    for interval in range(3, 12):
        train(together, 4 * interval - together[0].update - 1)
        for peer in together:  # the last update of the interval before
            guide = peer.codistiller._exchange
            until(lambda guide=guide: all(map(guide._fetcher.found, guide._neighbours.chosen)))
        train(together, 2)
        for number, peer in enumerate(together):
            drawn = Topology("random-2", peer=number, peers=5, seed=RUN).preference(interval)[:2]
            assert used(peer) == sorted(drawn), interval
            assert peer.metrics()["peers"] == 2
            assert peer.metrics()["gap"] <= 2 * 4 + 1
    for peer in together:
        assert len(peer.codistiller._exchange._modules._modules) == 2
        assert peer.built <= 3
        assert peer.causes() == {}


class Counting(Objects):
    """Remembers which documents were asked for."""

    def __init__(self, url):
        super().__init__(url)
        self.asked = []
        self.downloads = 0

    def get(self, key, **limit):
        self.asked.append(key)
        return super().get(key, **limit)

    def download(self, *args, **kwargs):
        self.downloads += 1
        return super().download(*args, **kwargs)


@pytest.mark.parametrize(
    ("n", "topology", "reads"),
    [(4, "all", 3), (4, "ring", 1), (16, "ring", 1), (4, "random-2", 2), (16, "random-2", 2)],
)
def test_what_a_peer_asks_of_the_store_does_not_grow_with_the_run(peers, monkeypatch, tmp_path, topology, reads, n):
    monkeypatch.setattr(fetcher, "POLL_SECONDS", 0.05)
    made = []

    def counting(url):
        made.append(Counting(url))
        return made[-1]

    others = [Writer(RunStore(Objects(str(tmp_path / "store")), RUN), peer=number) for number in range(1, n)]
    state = peers(1, save_dir="pattern").model.state_dict()
    monkeypatch.setattr(joining, "Objects", counting)
    peer = peers(0, peers=n, topology=topology)
    intervals = 12
    began = time.monotonic()
    for interval in range(intervals):
        for other in others:
            state["out.bias"] = state["also_out.bias"] = torch.full((5,), 100.0 * other.peer + interval)
            other.publish(state, 2 * interval, init_hash=f"{1000 + other.peer:064x}")
        peer.step(2)
        time.sleep(0.15)
    rounds = (time.monotonic() - began) / 0.05  # as many polls as there can have been
    [store] = made
    polls = [key for key in store.asked if key.endswith("latest.json") and "/peers/0/" not in key]
    strangers = 0.5 if topology != "all" else 0  # one of them at every other poll
    at_once = 2 * reads * intervals if topology == "random-2" else 0  # when a new draw is wished for
    assert len(polls) <= rounds * (reads + strangers) + at_once + reads + 1
    assert len(polls) >= intervals  # it did look
    assert reads * intervals / 2 <= store.downloads <= 2 * reads * intervals
    assert peer.metrics()["peers"] == reads
    machine = peer.codistiller._exchange._folder.path
    assert len(list(machine.glob("*.safetensors"))) <= 2 * reads * fetcher.FILES_PER_PEER


WORKER = """
import time
from pathlib import Path
import torch
from codistill import CodistillConfig, Codistiller
from codistill.exchange.checkpoint import fetcher

fetcher.POLL_SECONDS = 0.02
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
config = CodistillConfig(dir=FOLDER + "/store", run_id="run", interval=4, max_staleness=10**6, timeout=20.0, peers=4,
                         topology="random-1")
codistiller = Codistiller(config, model=model, build_peer=lambda: torch.nn.Linear(3, 2), fingerprint="f" * 64,
                          save_dir=Path(FOLDER))
history, weights = [], []
for update in range(2000):
    if update >= 120 and {peer for held in history for peer in held} == {"1", "2", "3"}:
        break  # both workers at the same update, since what they hold is the same
    codistiller.begin_update(update, 1)
    history.append(sorted(codistiller.state_dict()["in_use"]))
    modules = codistiller._exchange._modules._modules
    weights.append(sum(float(value.sum()) for module in modules.values() for value in module.state_dict().values()))
    time.sleep(0.02)
answer = {"history": history, "weights": weights, "causes": dict(codistiller._incidents.counts)}
codistiller.close()
"""


def test_workers_on_two_machines_follow_the_same_draws_at_the_same_updates(tmp_path):
    folders = [tmp_path / f"machine{rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    for peer in (1, 2, 3):
        writer = Writer(RunStore(Objects(str(tmp_path / "store")), RUN), peer=peer)
        writer.publish(linear(peer), 10, init_hash=f"{1000 + peer:064x}")
    first, second = data_parallel(
        tmp_path,
        f"FOLDER = {str(tmp_path)!r}\n{WORKER}",
        environments=[{"TMPDIR": str(folder)} for folder in folders],
    )
    assert first["history"] == second["history"]
    assert first["weights"] == second["weights"]
    assert first["causes"] == second["causes"] == {}
    assert {peer for held in first["history"] for peer in held} == {"1", "2", "3"}
    assert all(len(held) <= 1 for held in first["history"])


class Synchronous:
    """Four peers of a synchronous run, each in a thread of its own, as jobs are."""

    def __init__(self, peers, topology, folder):
        self._peers, self._folder = peers, folder
        self._options = {"peers": 4, "topology": topology, "sync": True, "dir": str(folder / "store")}
        self.jobs = [self._make(number) for number in range(4)]

    def _make(self, number, **changes):
        save_dir = str(self._folder / f"peer{number}")
        peer = self._peers(number, interval=3, timeout=30.0, keep=2, save_dir=save_dir, **self._options, **changes)
        peer.model.dropout.p = 0.0  # its generator would be shared by the threads
        return peer

    def train(self, *updates):
        train_side_by_side(self.jobs, updates)

    def checkpoint(self, number):
        peer = self.jobs[number]
        peer.codistiller.checkpoint_saved(peer.update)
        model = {name: value.clone() for name, value in peer.model.state_dict().items()}
        return model, peer.data.get_state(), peer.update, json.loads(json.dumps(peer.codistiller.state_dict()))

    def restart(self, number, checkpoint):
        self.jobs[number].codistiller.close()
        peer = self.jobs[number] = self._make(number, seed=1000 + number)
        model, data, peer.update, state = checkpoint
        peer.model.load_state_dict(model)
        peer.data.set_state(data)
        peer.codistiller.load_state_dict(state)

    def weights(self):
        return [value.clone() for peer in self.jobs for value in peer.model.state_dict().values()]


@pytest.mark.parametrize("topology", ["ring", "random-2"])
def test_a_synchronous_run_restarted_from_its_checkpoints_gives_the_same_bits(peers, topology, tmp_path):
    whole = Synchronous(peers, topology, tmp_path / "whole")
    whole.train(30, 30, 30, 30)
    broken = Synchronous(peers, topology, tmp_path / "broken")
    broken.train(7, 7, 7, 7)
    before = [broken.checkpoint(number) for number in range(4)]
    reads = 1 if topology == "ring" else 2
    assert [len(state["in_use"]) for *_, state in before] == [reads] * 4
    broken.train(13, 13, 13, 13)
    before = [broken.checkpoint(0), broken.checkpoint(1), before[2], broken.checkpoint(3)]
    broken.train(18, 17, 16, 18)
    for number in (0, 2):
        broken.restart(number, before[number])
    broken.train(30, 30, 30, 30)
    assert all(peer.causes() == {} for peer in [*whole.jobs, *broken.jobs])
    assert all(torch.equal(one, other) for one, other in zip(whole.weights(), broken.weights(), strict=True))
    store = RunStore(Objects(str(tmp_path / "broken" / "store")), RUN)
    oldest = [store.latest(number).retained[0].update for number in range(4)]
    if topology == "ring":  # pruned is what the next one does not need
        assert oldest == [12, 6, 12, 12]
    else:
        assert oldest == [6, 6, 12, 6]
    ring = [used(peer) for peer in whole.jobs] == [[3], [0], [1], [2]]
    assert ring == (topology == "ring")
