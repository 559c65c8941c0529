"""Codistillers of one process that really exchange over a folder: what they compute, and what they leave alone."""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import threading

import pytest
import torch

from codistill import KEYS, ConfigError, ExchangeFailed
from codistill.exchange.checkpoint.fetcher import snapshot_file
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
from codistill.meters import INITIAL_WEIGHTS, METRICS_FILE
from tests.fixtures_peers import (  # noqa: F401
    RUN,
    Tiny,
    codistill_threads,
    peers,
    quick_exchange,
    train_side_by_side,
    until,
)

# ruff: noqa: F811


def pair(peers, **changes):
    return peers(0, **changes), peers(1, **changes)


def both_in_use(first, second):
    """Train both until each compares itself with the other."""
    for _ in range(2000):
        if first.codistiller.active and second.codistiller.active:
            return
        first.step()
        second.step()
        threading.Event().wait(0.005)
    raise AssertionError("the peers did not take each other up")


def taken_up(peer):
    """The update of the other peer's snapshot in use."""
    return next(iter(peer.codistiller.state_dict()["in_use"].values()))["update"]


def plain(peers, updates, **changes):
    """Losses, parameters and generator state of a peer that trains without any penalty."""
    alone = peers(0, peers=1, save_dir="alone", **changes)
    torch.manual_seed(9)
    alone.step(updates)
    return alone.losses, alone.model.state_dict(), torch.get_rng_state()


def assert_same(found, expected):
    losses, state, generator = found
    assert losses == expected[0]
    assert all(torch.equal(state[name], value) for name, value in expected[1].items())
    assert torch.equal(generator, expected[2])


def test_the_penalty_is_the_mean_distance_to_the_weights_that_were_published(peers):
    first, second, third = (peers(peer, peers=3, temperature=2.0) for peer in range(3))
    published = {1: {}, 2: {}}

    def train_all():
        for peer, kept in ((second, published[1]), (third, published[2])):
            kept[peer.update] = {name: value.clone() for name, value in peer.model.state_dict().items()}
            peer.step()

    first.step_until(lambda: train_all() or first.metrics()["peers"] == 2)
    inputs = torch.randn(11, 4)
    mask = torch.arange(11) < 8
    own = torch.randn(11, 5, requires_grad=True)
    found = first.codistiller.penalty(own, lambda peer: peer(inputs), mask)
    expected = torch.zeros((), dtype=torch.float64)
    for number, used in first.codistiller.state_dict()["in_use"].items():
        reference = Tiny().eval()
        reference.load_state_dict(published[int(number)][used["update"]])
        with torch.no_grad():
            target = torch.softmax(reference(inputs).double() / 2, -1)
        mine = torch.log_softmax(own.double() / 2, -1)
        expected = expected + 4 * (target * (target.log() - mine)).sum(-1)[mask].sum() / 2
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.loss, own)
    (wanted,) = torch.autograd.grad(expected, own)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert (found.positions.item(), found.peers.item()) == (8, 2)


def test_what_a_peer_predicted_early_is_compared_once_and_with_that_batch(peers):
    first, second = peers(0), peers(1)
    first.step_until(lambda: second.step() or first.metrics()["peers"] == 1)
    own, inputs, asked = torch.randn(7, 5), torch.randn(7, 4), []

    def forward(peer):
        asked.append(peer)
        return peer(inputs)

    late = first.codistiller.penalty(own, forward)
    first.codistiller.predict_early(forward)
    assert len(asked) == 2
    early = first.codistiller.penalty(own, forward)
    assert len(asked) == 2
    assert early == late
    inputs = torch.randn(7, 4)
    assert first.codistiller.penalty(own, forward).loss != early.loss
    assert len(asked) == 3
    first.codistiller.predict_early(forward)  # for a batch that fails
    first.codistiller.begin_update(first.update + 1, 1)
    inputs = torch.randn(7, 4)
    assert first.codistiller.penalty(own, forward).loss == first.codistiller.penalty(own, forward).loss


def test_a_peer_alone_exchanges_nothing_and_still_reports(peers, tmp_path):
    before = codistill_threads()
    alone = peers(0, peers=1)
    alone.step(5)
    alone.codistiller.finish(alone.update)
    assert not (tmp_path / "store").exists()
    assert codistill_threads() <= before
    assert alone.built == 0
    metrics = alone.metrics()
    assert metrics["distance"] > 0
    assert {key: metrics[key] for key in KEYS if key not in ("distance", "seconds")} == dict.fromkeys(
        set(KEYS) - {"distance", "seconds"}, 0
    )
    lines = [json.loads(line) for line in (alone.save_dir / METRICS_FILE).read_text().splitlines()]
    assert [line["update"] for line in lines] == [2, 4, 5]


@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"burn_in": 10**6}], ids=["alpha 0", "burn-in"])
def test_without_weight_training_is_bitwise_the_training_of_one_peer_alone(peers, off):
    expected = plain(peers, 30)
    second = peers(1, **off)
    first = peers(0, **off)
    torch.manual_seed(9)
    generator = torch.get_rng_state()
    for _ in range(30):
        torch.set_rng_state(generator)
        first.step()
        generator = torch.get_rng_state()
        second.step()
        until(lambda: not first.codistiller._exchange._publisher._job)
    assert_same((first.losses, first.model.state_dict(), generator), expected)
    assert not first.codistiller.active


def test_a_peer_that_never_comes_changes_nothing(peers):
    expected = plain(peers, 30)
    first = peers(0)
    torch.manual_seed(9)
    first.step(30)
    assert_same((first.losses, first.model.state_dict(), torch.get_rng_state()), expected)
    assert first.causes() == {}


def test_no_generator_moves_when_a_peer_is_taken_up(peers):
    first, second = pair(peers)
    second.step(3)
    first.step(1)
    until(lambda: first.codistiller._exchange._fetcher.found(1))
    while first.update % 2:
        first.step()
    before = torch.get_rng_state()
    first.codistiller.begin_update(first.update, epoch=1)
    assert first.codistiller.active
    assert first.built == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_the_penalty_begins_right_after_burn_in(peers):
    first, second = pair(peers, burn_in=6, keep=100)
    second.step(5)
    first.step(2)
    until(lambda: first.codistiller._exchange._fetcher.found(1))
    active = []
    for _ in range(6):
        first.step()
        active.append((first.update, first.codistiller.active, first.codistiller.alpha))
    assert [(update, on) for update, on, _ in active] == [(u, u > 6) for u in range(3, 9)]
    assert [alpha for _, _, alpha in active] == [0, 0, 0, 0, 1, 1]


def test_a_peer_that_falls_silent_is_used_until_it_is_too_stale_and_again_when_it_returns(peers):
    first, second = pair(peers, max_staleness=6)
    both_in_use(first, second)
    used = taken_up(first)
    first.step_until(lambda: not first.codistiller.active)
    in_use = first.codistiller.state_dict()["in_use"]["1"]
    assert first.update - 1 - in_use["accepted"] == 7
    assert first.metrics()["peers"] == 0
    second.step(4)
    first.step_until(lambda: first.codistiller.active)
    assert taken_up(first) > used
    assert first.metrics()["staleness"] <= 6


def test_a_final_snapshot_never_goes_stale(peers):
    first, second = pair(peers, max_staleness=4)
    both_in_use(first, second)
    second.codistiller.finish(second.update)
    first.step_until(lambda: first.codistiller.state_dict()["in_use"]["1"]["final"])
    first.step(100)
    assert first.codistiller.active
    assert taken_up(first) == second.update
    assert first.metrics()["staleness"] == 0
    assert first.metrics()["gap"] == first.update - 1 - second.update


def test_a_final_snapshot_of_an_update_that_was_published_already_is_final_too(peers):
    first, second = pair(peers, max_staleness=4)
    at_a_boundary(second, first)
    second.codistiller.finish(second.update)
    first.step_until(lambda: first.codistiller.state_dict()["in_use"]["1"]["final"])
    assert taken_up(first) == second.update
    assert second.causes() == {}


def test_an_end_that_is_not_normal_leaves_no_final_snapshot(peers):
    first, second = pair(peers, max_staleness=4)
    both_in_use(first, second)
    second.codistiller.close()
    first.step_until(lambda: not first.codistiller.active)
    assert not first.codistiller.state_dict()["in_use"]["1"]["final"]


def resume(peers, peer, **changes):
    """The same job again, from what a checkpoint would hold."""
    again = peers(0, **{"seed": 77, **changes})
    again.model.load_state_dict(peer.model.state_dict())
    again.codistiller.load_state_dict(json.loads(json.dumps(peer.codistiller.state_dict())))
    again.update = peer.update
    return again


def test_a_resumed_peer_takes_up_exactly_what_was_in_use(peers):
    first, second = pair(peers, keep=100)
    both_in_use(first, second)
    state = first.codistiller.state_dict()
    first.codistiller.close()
    second.step(20)  # there is something newer by now
    again = resume(peers, first, keep=100)
    while again.update % 2 == 0:  # a boundary would look for what is newer
        again.update += 1
    again.codistiller.begin_update(again.update, epoch=1)
    assert again.codistiller.state_dict()["in_use"] == state["in_use"]
    assert again.codistiller.state_dict()["init_hash"] == state["init_hash"]
    assert again.codistiller.active
    until(lambda: taken_up(again) > state["in_use"]["1"]["update"] or again.step())


def test_a_resumed_peer_knows_that_what_was_in_use_is_final(peers):
    first, second = pair(peers, max_staleness=4)
    at_a_boundary(second, first)
    idle(second)  # it is on the store by now, and its own document does not say so
    second.codistiller.finish(second.update)
    first.step_until(lambda: first.codistiller.state_dict()["in_use"]["1"]["final"])
    first.step(9 + first.update % 2)
    first.codistiller.close()
    again = resume(peers, first, max_staleness=4)
    again.step()  # within an interval
    assert again.metrics()["peers"] == 1
    assert again.metrics()["staleness"] == 0


def test_a_resumed_peer_takes_up_the_newest_at_once_when_what_was_in_use_is_gone(peers):
    first, second = pair(peers)
    both_in_use(first, second)
    used = taken_up(first)
    first.codistiller.close()
    for _ in range(5):
        second.step(2)
        until(lambda: not second.codistiller._exchange._publisher._job)
    again = resume(peers, first)
    while again.update % 2 == 0:  # a boundary would look for what is newer
        again.update += 1
    again.codistiller.begin_update(again.update, epoch=1)
    assert again.codistiller.active
    assert taken_up(again) > used
    assert again.causes() == {}


def test_a_resumed_peer_does_not_take_another_snapshot_for_the_one_that_was_in_use(peers):
    first, second = pair(peers, keep=100)
    both_in_use(first, second)
    used = taken_up(first)
    state = json.loads(json.dumps(first.codistiller.state_dict()))
    state["in_use"]["1"]["sha256"] = "0" * 64
    first.codistiller.close()
    for _ in range(4):
        second.step()
        idle(second)
    again = peers(0, seed=77, keep=100)
    again.codistiller.load_state_dict(state)
    again.codistiller.begin_update(first.update | 1, epoch=1)  # no boundary, which would look for what is newer
    assert taken_up(again) > used


def test_a_resumed_peer_goes_on_without_a_peer_of_which_nothing_is_left(peers):
    first, second = pair(peers)
    both_in_use(first, second)
    for peer in (first, second):
        peer.codistiller.close()
    shutil.rmtree(first.save_dir.parent / "store" / RUN / "peers" / "1")
    again = resume(peers, first, timeout=0.5)
    again.step(3)
    assert again.causes() == {"gone": 1}
    assert not again.codistiller.active


@pytest.mark.parametrize("anew", [True, False], ids=["anew", "trained longer"])
def test_a_new_training_in_the_place_of_one_that_has_ended_is_told_so(peers, caplog, anew):
    first = peers(0)
    first.step()
    first.codistiller.finish(first.update)
    again = peers(0, save_dir="anew") if anew else resume(peers, first)
    again.step()
    assert caplog.text.count("a new training needs a new --codistill-run-id") == anew


def test_a_counter_that_was_set_back_does_not_make_a_peer_look_fresh(peers):
    first, second = pair(peers, max_staleness=6)
    both_in_use(first, second)
    while first.update < 20:
        first.step()
        second.step()
    first.codistiller.close()
    second.codistiller.close()
    again = resume(peers, first, max_staleness=6)
    again.update = 0
    again.step()
    assert again.metrics()["staleness"] == 0
    again.step(20)
    assert again.metrics()["peers"] == 0


def test_a_checkpoint_taken_to_another_run_leaves_the_old_runs_peers_behind(peers):
    first, second = pair(peers, sync=False)
    both_in_use(first, second)
    first.codistiller.close()
    again = resume(peers, first, run_id="another", sync=True)
    again.update += again.update % 2 == 0
    again.codistiller.begin_update(again.update, epoch=1)
    assert again.codistiller.state_dict()["in_use"] == {}
    assert again.causes() == {}


def test_the_state_is_there_before_the_first_update_too(peers):
    state = peers(0).codistiller.state_dict()
    assert state["in_use"] == {}
    assert state["update"] is None


def test_nothing_is_written_before_the_first_update(peers, tmp_path, quick_exchange):
    peer = peers(0)
    peer.codistiller.metrics()
    peer.codistiller.checkpoint_saved(0)
    assert not (tmp_path / "store").exists()
    assert list(peer.save_dir.iterdir()) == []
    peer.codistiller.finish(0)
    peer.codistiller.close()


def test_beginning_the_same_update_again_changes_nothing(peers):
    first, second = pair(peers)
    both_in_use(first, second)
    while first.update % 2:
        first.step()
    first.codistiller.begin_update(first.update, epoch=1)
    before = first.metrics()
    for _ in range(3):
        first.codistiller.begin_update(first.update, epoch=1)
    assert {**first.metrics(), "sent": 0} == {**before, "sent": 0}


def test_every_key_is_reported_at_every_stage(peers):
    first, second = pair(peers)
    reported = [first.metrics()]
    both_in_use(first, second)
    first.step(3)
    reported.append(first.metrics())
    assert 0 <= reported[-1]["agreement"] <= 1
    assert reported[-1]["loss"] > 0
    assert reported[-1]["peers"] == 1
    assert reported[-1]["sent"] > 0
    assert reported[-1]["received"] > 0
    first.codistiller.finish(first.update)
    reported.append(first.metrics())
    assert all(tuple(metrics) == KEYS for metrics in reported)
    assert all(isinstance(value, int | float) for metrics in reported for value in metrics.values())


def test_metrics_are_kept_in_the_save_dir_for_every_boundary(peers):
    first, second = pair(peers)
    both_in_use(first, second)
    first.codistiller.finish(first.update)
    lines = [json.loads(line) for line in (first.save_dir / METRICS_FILE).read_text().splitlines()]
    boundaries = list(range(2, first.update, 2))
    assert [line["update"] for line in lines] == [*boundaries, first.update]
    assert all(line.keys() == {*KEYS, "update", "epoch", "wall", "started"} for line in lines)


def idle(peer):
    """Wait until nothing of the peer's is being published."""
    exchange = peer.codistiller._exchange
    until(lambda: exchange is None or exchange._publisher._job is None)


def lines_of(peer):
    return [json.loads(line) for line in (peer.save_dir / METRICS_FILE).read_text().splitlines()]


def moved_since(peer):
    """Gives how far the peer's model is, whenever it is asked, from where it is now."""
    start = [parameter.detach().clone() for parameter in peer.model.parameters()]

    def distance():
        pairs = zip(peer.model.parameters(), start, strict=True)
        return math.sqrt(sum((now.detach() - then).square().sum().item() for now, then in pairs))

    return distance


@pytest.mark.parametrize("count", [1, 2])
def test_every_line_tells_the_distance_at_its_own_update(peers, count):
    peer = peers(0, peers=count)
    distance, wanted = moved_since(peer), {}
    for update in range(9):
        wanted[update] = distance()
        peer.step()
        idle(peer)  # else a publication is skipped
    wanted[9] = distance()
    peer.codistiller.finish(9)
    found = {line["update"]: line["distance"] for line in lines_of(peer)}
    assert found == pytest.approx({update: wanted[update] for update in (2, 4, 6, 8, 9)}, rel=1e-5)
    assert peer.metrics()["distance"] == found[9]
    if count == 2:
        manifest = RunStore(Objects(peer.codistiller.config.dir), RUN).latest(0).manifest
        assert manifest.metrics["distance"] == found[9]


def test_lines_wait_for_no_store_and_one_without_a_copy_knows_no_distance(peers):
    peer = peers(0)
    peer.step()
    publisher, free = peer.codistiller._exchange._publisher, threading.Event()
    put = publisher._store.put_snapshot
    publisher._store.put_snapshot = lambda *given: (free.wait(20), put(*given))
    peer.step(2)
    until(lambda: publisher._storing)
    peer.step(2)
    until(lambda: len(lines_of(peer)) == 2)
    assert [(line["update"], line["distance"] is None) for line in lines_of(peer)] == [(2, False), (4, True)]
    assert peer.metrics()["skipped"] == 1
    free.set()


def test_a_line_that_still_waits_when_the_process_leaves_is_written(peers):
    peer = peers(0)
    peer.step()
    peer.codistiller._distance.measure = lambda state: 1 / 0  # never told
    peer.step(2)
    peer.codistiller.close()
    assert [(line["update"], line["distance"]) for line in lines_of(peer)] == [(2, None)]


def test_the_distance_is_known_though_nothing_is_published_any_more(peers):
    first = peers(0)
    first.step(3)
    peers(0).step()  # in its place
    first.step_until(lambda: "superseded" in first.causes())
    before = first.metrics()["distance"]
    first.step(4)
    assert first.metrics()["distance"] != before


@pytest.mark.parametrize("told", [True, False], ids=["with our state", "without it"])
def test_after_a_resume_the_distance_is_known_at_once(peers, told):
    first = peers(0, peers=1)
    distance = moved_since(first)
    first.step(5)
    first.codistiller.close()
    again = peers(0, peers=1, seed=77)
    again.model.load_state_dict(first.model.state_dict())
    if told:  # fairseq keeps it back with --reset-dataloader
        again.codistiller.load_state_dict(first.codistiller.state_dict())
    again.codistiller.begin_update(first.update, epoch=1)
    assert again.metrics()["distance"] == pytest.approx(distance(), rel=1e-5)


def test_an_interval_that_was_cut_in_two_by_a_restart_is_told_of_as_a_whole(peers):
    first, second = pair(peers, sync=False)
    both_in_use(first, second)
    first.step(2 + first.update % 2)  # up to the end of an interval, which the next update would tell
    state = first.codistiller.state_dict()
    again = resume(peers, first)
    first.codistiller.begin_update(first.update, epoch=1)
    first.codistiller.close()
    again.codistiller.begin_update(again.update, epoch=1)
    assert state["sums"]
    told = [(metrics["loss"], metrics["agreement"]) for metrics in (first.metrics(), again.metrics())]
    assert told[0] == told[1]
    assert told[0][0] > 0


def at_a_boundary(first, second):
    """Both in use, and `first` about to do the first update of an interval."""
    both_in_use(first, second)
    while first.update % 2:
        first.step()
    first.codistiller.begin_update(first.update, epoch=1)


def compared(peer, *factors):
    """The peer's penalties for some batches whose predictions are multiplied by a number."""
    inputs = torch.randn(7, 4)
    return [peer.codistiller.penalty(torch.randn(7, 5), lambda module, x=x: x * module(inputs)) for x in factors]


def test_batches_without_a_usable_peer_do_not_dilute_loss_and_agreement(peers):
    first, second = pair(peers)
    at_a_boundary(first, second)
    found, _, _ = compared(first, 1, math.nan, math.inf)
    first.codistiller.begin_update(first.update + 2, epoch=1)
    assert first.metrics()["loss"] == pytest.approx(found.loss.item() / 7)
    assert first.metrics()["agreement"] == pytest.approx(found.agreement.item() / 7)
    assert first.causes() == {"non-finite": 1}


def test_an_interval_that_training_ends_in_is_told_of_like_a_whole_one(peers):
    first, second = pair(peers)
    at_a_boundary(first, second)
    found, _ = compared(first, 1, math.nan)
    first.codistiller.finish(first.update + 1)
    last = lines_of(first)[-1]
    assert (last["update"], last["loss"]) == (first.update + 1, pytest.approx(found.loss.item() / 7))
    assert last["agreement"] == pytest.approx(found.agreement.item() / 7)
    assert first.causes() == {"non-finite": 1}
    manifest = RunStore(Objects(first.codistiller.config.dir), RUN).latest(0).manifest
    assert (manifest.update, manifest.metrics["loss"]) == (last["update"], last["loss"])


def test_training_that_ends_with_an_interval_keeps_what_is_told_of_it(peers):
    first, second = pair(peers)
    both_in_use(first, second)
    first.step(2)
    at_a_boundary(first, second)
    before = first.metrics()
    assert before["loss"] > 0
    first.codistiller.finish(first.update)
    assert lines_of(first)[-1]["loss"] == before["loss"]


def test_a_peer_whose_outputs_are_not_finite_is_left_out_and_counted(peers):
    first, second = pair(peers)
    with torch.no_grad():
        second.model.out.weight.fill_(3e38)  # finite weights, infinite predictions
    second.step = lambda times=1: None
    second.codistiller.begin_update(0, epoch=1)
    second.codistiller.begin_update(2, epoch=1)
    first.step_until(lambda: first.codistiller.active)
    first.step(4)
    assert all(map(math.isfinite, first.losses))
    assert all(bool(p.isfinite().all()) for p in first.model.parameters())
    assert set(first.causes()) == {"non-finite"}


def test_a_peer_whose_module_fails_is_left_out_until_it_sends_something_new(peers, caplog):
    first, second = pair(peers)
    both_in_use(first, second)
    idle(second)
    newest = RunStore(Objects(second.codistiller.config.dir), RUN).latest(1).manifest.update
    first.step_until(lambda: taken_up(first) == newest)
    module = first.codistiller._exchange._modules._modules[1]
    failing = module.register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("on purpose")))
    first.step()
    assert first.causes() == {"internal": 1}
    assert not first.codistiller.active
    assert "peer 1: OutOfMemoryError: on purpose" in caplog.text
    failing.remove()
    first.step(6)
    assert not first.codistiller.active
    first.step_until(lambda: second.step() or first.codistiller.active)
    assert taken_up(first) > newest
    assert all(map(math.isfinite, first.losses))
    assert first.causes() == {"internal": 1}


def test_a_manifest_tells_the_peers_metrics_and_architecture(peers):
    first, second = peers(0, architecture={"name": "tiny", "arguments": {"width": 6}}), peers(1)
    both_in_use(first, second)
    first.codistiller.finish(first.update)
    manifest = RunStore(Objects(first.codistiller.config.dir), RUN).latest(0).manifest
    assert manifest.architecture == {"name": "tiny", "arguments": {"width": 6}}
    assert manifest.metrics.keys() == set(KEYS)
    assert (manifest.metrics["alpha"], manifest.metrics["peers"]) == (1.0, 1.0)


def test_on_sigterm_the_weights_of_now_are_published_but_never_as_final(peers):
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        first = peers(0, interval=100)
        first.step(3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set()
        first.step(2)  # the handler that was there decides what becomes of the process
        latest = RunStore(Objects(first.codistiller.config.dir), RUN).latest(0)
        assert (latest.manifest.update, latest.manifest.final, latest.closed) == (3, False, False)
        assert first.causes() == {}
        first.codistiller.close()
        asked.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_weights_that_are_not_finite_are_refused_and_the_last_good_ones_kept(peers):
    first, second = pair(peers, max_staleness=10**6)
    both_in_use(first, second)
    with torch.no_grad():
        second.model.embed.weight.fill_(math.nan)
    first.step_until(lambda: second.step() or first.causes())
    first.step(4)
    assert set(first.causes()) == {"non-finite"}
    assert first.codistiller.active
    assert all(map(math.isfinite, first.losses))


def test_peers_that_start_from_the_same_weights_are_told_so_and_train_on(peers, caplog):
    first, second = peers(0, seed=5), peers(1, seed=5)
    with caplog.at_level(logging.WARNING, "codistill"):
        second.step(3)
        first.step_until(lambda: first.causes())
        first.step(5)
    assert set(first.causes()) == {"init"}
    assert not first.codistiller.active
    assert "peer 1: it started from the same initial weights as this peer; give each peer its own seed" in caplog.text


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"fingerprint": "e" * 64}, f"output={'f' * 64}, not {'e' * 64}"),
        ({"interval": 3}, "interval=2, not 3"),
        ({"loss": "ce"}, "loss=kl, not ce"),
        ({"temperature": 2.0}, "temperature=1.0, not 2.0"),
        ({"peers": 3}, "peers=2, not 3"),
        ({"sync": True}, "sync=false, not true"),
        ({"dtype": "bfloat16"}, "dtype=float32, not bfloat16"),
    ],
)
def test_other_options_than_the_runs_are_refused_by_name(peers, changes, difference):
    peers(0).step()
    other = peers(1, **changes)
    with pytest.raises(ConfigError) as caught:
        other.step()
    assert str(caught.value) == (
        f"run {RUN} was started with {difference}; "
        "give all peers of a run the same options, or a new --codistill-run-id"
    )


def test_options_that_concern_one_peer_alone_may_differ(peers):
    peers(0).step()
    peers(1, alpha=0.5, burn_in=3, keep=7, timeout=5.0, max_staleness=9).step()


def test_a_number_that_a_running_peer_has_is_refused_and_that_peer_unharmed(peers):
    first, second = pair(peers)
    both_in_use(first, second)
    intruder = peers(0, save_dir="elsewhere", seed=8)
    with pytest.raises(ConfigError) as caught:
        intruder.step()
    assert str(caught.value) == (
        "--codistill-peer 0: a running process with another save dir has this number; "
        "give each peer of the run its own --codistill-peer"
    )
    first.step(4)
    assert first.causes() == {}
    assert first.codistiller.active


def test_a_dir_that_cannot_be_opened_is_told_in_one_line(peers, tmp_path):
    (tmp_path / "file").write_text("")
    peer = peers(0, dir=str(tmp_path / "file" / "store"))
    with pytest.raises(ConfigError) as caught:
        peer.step()
    assert str(caught.value).startswith(f"--codistill-dir {tmp_path}/file/store: cannot be opened: ")
    assert "\n" not in str(caught.value)


def put_a_file_in_the_place_of(folder):
    """Moves the folder away; a put under way may bring it back before the file stands there, and is moved away too."""
    for attempt in range(100):
        folder.rename(folder.with_name(f"{folder.name}-moved-{attempt}"))
        with contextlib.suppress(FileExistsError), open(folder, "x") as file:
            file.write("no folder any more")
            return
    raise AssertionError(f"{folder} came back again and again")


def test_a_store_that_vanishes_is_counted_and_training_goes_on(peers, tmp_path):
    first, second = pair(peers)
    both_in_use(first, second)
    put_a_file_in_the_place_of(tmp_path / "store")
    first.step_until(lambda: first.causes())
    first.step(4)
    assert set(first.causes()) == {"storage"}
    assert first.codistiller.active
    (tmp_path / "store").unlink()


def test_a_run_that_shall_fail_on_trouble_ends_with_one_line(peers):
    first, second = peers(0, seed=5, on_error="fail"), peers(1, seed=5)
    second.step(3)
    with pytest.raises(ExchangeFailed) as caught:
        first.step_until(lambda: False)
    assert str(caught.value) == (
        "peer 1: it started from the same initial weights as this peer; give each peer its own seed, or, if both start "
        "from one checkpoint, some weights of its own (a fresh head); "
        "ended by --codistill-on-error fail"
    )


def test_trouble_with_the_final_snapshot_ends_such_a_run_with_one_line_too(peers, tmp_path):
    first, second = pair(peers, on_error="fail", timeout=1.0)
    both_in_use(first, second)
    second.codistiller.close()
    put_a_file_in_the_place_of(tmp_path / "store")
    with pytest.raises(ExchangeFailed, match="ended by --codistill-on-error fail"):
        first.codistiller.finish(first.update)
    (tmp_path / "store").unlink()


def test_a_process_that_was_replaced_and_still_runs_keeps_its_files_and_leaves_its_successors(peers, quick_exchange):
    first, second = peers(0), peers(0)
    first.step()
    second.step()
    assert len(list(quick_exchange.iterdir())) == 2
    first.codistiller.close()
    assert list(quick_exchange.iterdir()) == [second.codistiller._exchange._folder.path]


def test_a_snapshot_that_vanishes_from_the_machine_does_not_end_the_exchange(peers):
    first, second = pair(peers, max_staleness=10**6)
    both_in_use(first, second)
    exchange = first.codistiller._exchange
    while first.update % 2:
        first.step()
    second.step(4)
    manifest = until(lambda: (found := exchange._fetcher.found(1)) and found.update > taken_up(first) and found)
    snapshot_file(exchange._folder.path, manifest.sha256).unlink()
    first.step()
    until(lambda: first.step_until(lambda: taken_up(first) >= manifest.update) or True)
    newest = taken_up(first)
    second.step(4)
    first.step_until(lambda: taken_up(first) > newest)


@pytest.mark.parametrize("count", [1, 2])
def test_initial_weights_that_are_spoilt_cost_only_the_distance(peers, count):
    peer = peers(0, peers=count)
    peer.step()
    (peer.save_dir / INITIAL_WEIGHTS).write_bytes(b"spoilt")
    peer.step(6)
    until(lambda: math.isnan(peer.metrics()["distance"]))
    assert set(peer.causes()) == {"metrics"}
    if count == 2:
        until(lambda: peer.metrics()["sent"] > 0)


def test_a_parameter_that_leaves_the_model_costs_only_the_distance(peers):
    alone = peers(0, peers=1)
    alone.step(3)
    alone.model.norm = torch.nn.Sequential(alone.model.norm)  # as quantisation replaces what it has quantised
    alone.step(3)
    assert set(alone.causes()) == {"metrics"}
    assert math.isnan(alone.metrics()["distance"])


def test_initial_weights_that_cannot_be_kept_are_an_incident(peers):
    peer = peers(0, peers=1)
    peer.save_dir.rmdir()
    peer.save_dir.write_text("not a folder")
    peer.step(3)
    assert set(peer.causes()) == {"metrics"}


def test_closing_twice_leaves_no_thread_and_no_file_on_the_machine(peers, quick_exchange):
    before = codistill_threads()
    first, second = pair(peers)
    both_in_use(first, second)
    assert len(list(quick_exchange.iterdir())) == 2
    for peer in (first, second):
        peer.codistiller.close()
        peer.codistiller.close()
    assert list(quick_exchange.iterdir()) == []
    assert codistill_threads() <= before
    first.step(5)  # a host that has one more update to do is not disturbed


def test_finishing_twice_publishes_one_final_snapshot(peers, tmp_path):
    first, second = pair(peers)
    both_in_use(first, second)
    first.codistiller.finish(first.update)
    first.codistiller.finish(first.update)
    latest = json.loads((tmp_path / "store" / RUN / "peers" / "0" / "latest.json").read_text())
    assert (latest["closed"], latest["manifest"]["final"], latest["manifest"]["update"]) == (True, True, first.update)
    assert first.causes() == {}


class Sync:
    """Two peers of a synchronous run, each in a thread of its own, as jobs are."""

    def __init__(self, peers, **changes):
        self.make = lambda peer, **more: self._without_dropout(
            peers(peer, **{"sync": True, "interval": 3, "timeout": 30.0, **changes, **more})
        )
        self.pair = [self.make(0), self.make(1)]

    @staticmethod
    def _without_dropout(peer):
        peer.model.dropout.p = 0.0  # its generator would be shared by the threads
        return peer

    def train(self, *updates):
        """Bring each peer to its number of updates."""
        train_side_by_side(self.pair, updates)

    def checkpoint(self, number):
        peer = self.pair[number]
        return {
            "model": {name: value.clone() for name, value in peer.model.state_dict().items()},
            "data": peer.data.get_state(),
            "update": peer.update,
            "codistill": json.loads(json.dumps(peer.codistiller.state_dict())),
        }

    def restart(self, number, checkpoint):
        """What a new process does after a kill."""
        self.pair[number].codistiller.close()
        peer = self.pair[number] = self.make(number, seed=1000 + number)
        peer.model.load_state_dict(checkpoint["model"])
        peer.data.set_state(checkpoint["data"])
        peer.update = checkpoint["update"]
        peer.codistiller.load_state_dict(checkpoint["codistill"])

    def weights(self):
        return [parameter.detach().clone() for peer in self.pair for parameter in peer.model.state_dict().values()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_two_synchronous_runs_give_the_same_bits(peers):
    found = []
    for run in ("one", "two"):
        sync = Sync(peers, run_id=run)
        sync.train(14, 14)
        assert all(peer.causes() == {} for peer in sync.pair)
        assert [taken_up(peer) for peer in sync.pair] == [12, 12]
        found.append(sync.weights())
    assert same(*found)
    alone = peers(0, peers=1, save_dir="alone")
    alone.model.dropout.p = 0.0
    alone.step(14)
    assert not torch.equal(alone.model.embed.weight, found[0][0])


@pytest.mark.parametrize(
    ("saved", "killed", "restarted"),
    [
        ((5, 5), (8, 7), (0,)),
        ((5, 5), (8, 7), (0, 1)),
        ((6, 6), (9, 8), (0, 1)),
        ((4, 16), (18, 17), (0, 1)),
        ((16, 4), (18, 17), (0, 1)),
        ((16, 4), (18, 17), (1,)),
        ((1, 2), (18, 16), (0, 1)),
    ],
)
def test_a_synchronous_run_restarted_from_its_checkpoints_gives_the_same_bits(peers, saved, killed, restarted):
    whole = Sync(peers, run_id="whole")
    whole.train(20, 20)
    broken = Sync(peers, run_id="broken")
    checkpoints = {}
    for update, number in sorted((update, number) for number, update in enumerate(saved)):
        broken.train(update, update)
        checkpoints[number] = broken.checkpoint(number)
        broken.pair[number].codistiller.checkpoint_saved(update)
    broken.train(*killed)
    for number in restarted:
        broken.restart(number, checkpoints[number])
    broken.train(20, 20)
    assert all(peer.causes() == {} for peer in broken.pair)
    assert same(whole.weights(), broken.weights())
