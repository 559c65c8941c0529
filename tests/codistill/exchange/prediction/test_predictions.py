"""Real processes that exchange predictions: what they compute, and what becomes of them when one of them fails."""

import json
import os
import signal
import socket
import time

import pytest
import torch

from codistill import CodistillConfig
from codistill.exchange.membership import Identity
from codistill.exchange.prediction import predictions
from codistill.exchange.prediction.posts import Proposal
from codistill.exchange.prediction.predictions import PredictionExchange
from codistill.exchange.prediction.rendezvous import Rendezvous
from codistill.exchange.prediction.wire import decode, encode
from codistill.exchange.protocol import Position
from codistill.losses import distill
from codistill.meters import Incidents
from codistill.status import look
from codistill.survey import Survey
from codistill.workers import Workers
from tests.fixtures_peers import RUN, codistill_threads
from tests.fixtures_predictions import TrainingProcesses

FEW = 10  # micro-batches that are enough to believe it


@pytest.fixture(scope="module")
def processes():
    with TrainingProcesses() as started:
        yield started


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def place(record):
    return record["epoch"], record["batch"]


def exchanged_since(job, record):
    """Whether `job` has exchanged some micro-batches after `record`."""
    return lambda: [one for one in job.exchanged() if place(one) > place(record)][FEW:]


def told_apart(job):
    """How often `job` gave a group up whose members only differed."""
    return (job.records() or [{"causes": {}}])[-1]["causes"].get("apart", 0)


def end_all(*jobs):
    """Let all train to the end; how they ended."""
    for job in jobs:
        job.stop()
    return [job.end() for job in jobs]


def assert_true_penalties(*jobs, rank=0, travelled=torch.tensor):
    """Every penalty is the distance to what the others computed for the same micro-batch."""
    logits = [{place(record): record["logits"] for record in job.exchanged(rank)} for job in jobs]
    compared = 0
    for job, own in zip(jobs, logits, strict=True):
        for record in job.exchanged(rank):
            there = [other[place(record)] for other in logits if other is not own and place(record) in other]
            if len(there) != record["used"]:
                continue  # somebody was killed before it told of it
            mine = torch.tensor(record["logits"])
            expected = distill(mine, [travelled(one) for one in there], loss="kl")
            assert record["penalty"] == expected.loss.item()
            compared += 1
    assert compared >= FEW * len(jobs)


def test_two_peers_on_a_folder_swap_the_logits_of_every_micro_batch(processes, tmp_path):
    jobs = [processes.job(tmp_path, peer, accumulate=2, per_epoch=51) for peer in range(2)]
    for job in jobs:
        job.until(lambda job: len(job.exchanged()) > 120)  # over the ends of epochs, whose last update is short
    ends = end_all(*jobs)
    assert_true_penalties(*jobs)
    for job, end in zip(jobs, ends, strict=True):
        first = next(index for index, record in enumerate(job.records()) if record["used"])
        assert sum(record["used"] for record in job.records()[first:]) >= len(job.records()) - first - 4
        assert end["left"] == []
        assert end["metrics"]["sent"] > FEW * 6 * 5 * 4
        assert end["metrics"]["sent"] == end["metrics"]["received"]


def test_what_travels_is_what_the_options_say(processes, tmp_path):
    options = {"dtype": "bfloat16", "topk": 2}
    jobs = [processes.job(tmp_path, peer, options=options) for peer in range(2)]
    for job in jobs:
        job.until(lambda job: len(job.exchanged()) > FEW)
    end_all(*jobs)

    def travelled(logits):
        there = torch.tensor(logits)
        return decode(encode(there, "bfloat16", 2), there, "bfloat16", 2)

    assert_true_penalties(*jobs, travelled=travelled)


def test_three_peers_meet_at_an_address_and_need_no_folder(processes, tmp_path, free_port):
    options = {"dir": None, "rendezvous": f"tcp://127.0.0.1:{free_port}", "peers": 3}
    jobs = [processes.job(tmp_path, peer, options=options) for peer in (2, 1, 0)]
    for job in jobs:
        job.until(lambda job: [record for record in job.exchanged() if record["used"] == 2][FEW:])
    ends = end_all(*jobs)
    assert_true_penalties(*jobs)
    assert not (tmp_path / "store").exists()
    assert all(end["left"] == [] for end in ends)
    with socket.socket() as again:
        again.bind(("127.0.0.1", free_port))


def test_one_that_comes_while_two_others_connect_costs_them_nothing(processes, tmp_path):
    options = {"peers": 3, "timeout": 30.0}
    one, slow = processes.job(tmp_path, 0, options=options), processes.job(tmp_path, 1, options=options, pause=0.3)
    one.until(lambda job: "peers 0, 1 exchange" in job.output())
    third = processes.job(tmp_path, 2, options=options)
    for job in (one, slow, third):
        job.until(lambda job: [record for record in job.exchanged() if record["used"] == 2][FEW:], seconds=60.0)
    assert [job.records()[-1]["causes"] for job in (one, slow, third)] == [{}, {}, {}], one.output()


def test_a_killed_peer_costs_nothing_and_comes_in_again_where_the_others_are(processes, tmp_path):
    one, other = (processes.job(tmp_path, peer) for peer in range(2))
    one.until(lambda job: len(job.exchanged()) > FEW)
    other.kill()
    killed = one.records()[-1]
    one.until(lambda job: len(job.records()) > 150 + killed["batch"])  # data that the other will have missed
    alone = [record for record in one.records() if place(record) > place(killed)]
    assert max(record["seconds"] for record in alone) < 1.0
    assert alone[-1]["used"] == 0
    assert alone[-1]["causes"] == {"lost": 1}
    before = one.records()[-1]
    other.start()
    for job in (one, other):
        job.until(lambda job: exchanged_since(job, before)())
    end_all(one, other)
    assert_true_penalties(one, other)
    assert any("skip" in record for record in other.records())
    assert "this one goes on there from epoch 1" in other.output()
    assert not any("skip" in record for record in one.records())


def test_of_three_peers_two_go_on_together_when_one_is_killed(processes, tmp_path):
    one, two, three = jobs = [processes.job(tmp_path, peer, options={"peers": 3}) for peer in range(3)]
    for job in jobs:
        job.until(lambda job: [record for record in job.exchanged() if record["used"] == 2][FEW:])
    one.kill()  # the one that led
    killed = two.records()[-1]
    for job in (two, three):
        job.until(lambda job: exchanged_since(job, killed)())
        assert job.exchanged()[-1]["used"] == 1
        assert max(record["seconds"] for record in job.records() if place(record) > place(killed)) < 2.0
    one.start()
    for job in jobs:
        job.until(lambda job: job.records()[-1]["used"] == 2)
    end_all(*jobs)
    assert_true_penalties(two, three, one)


def test_a_stopped_peer_is_waited_for_within_the_timeout_and_comes_in_again_when_it_goes_on(processes, tmp_path):
    one, other = (processes.job(tmp_path, peer, options={"timeout": 2.0}) for peer in range(2))
    one.until(lambda job: len(job.exchanged()) > FEW)
    other.signal(signal.SIGSTOP)
    one.until(lambda job: job.records()[-1]["causes"].get("lost"))
    stopped = one.records()[-1]
    assert 1.0 < max(record["seconds"] for record in one.records()) < 4.0
    time.sleep(1.0)
    other.signal(signal.SIGCONT)
    for job in (one, other):
        job.until(lambda job: exchanged_since(job, stopped)())
    end_all(one, other)
    assert_true_penalties(one, other)


def test_peers_with_different_data_train_as_if_they_were_alone(processes, tmp_path):
    alone = processes.job(tmp_path, 0, options={"peers": 1}, name="alone", updates=150)
    jobs = [processes.job(tmp_path, peer, data_seed=1 + peer, updates=150, pause=0.02) for peer in range(2)]
    ends = [job.end() for job in jobs]
    assert all(end["causes"]["inputs"] >= 8 for end in ends)
    assert all(end["causes"]["apart"] >= 1 for end in ends)
    assert "its data, augmentation or mixup differ from ours" in jobs[0].output()
    assert jobs[0].exchanged() == []
    alone.end()
    expected = torch.load(tmp_path / "alone" / "final", weights_only=True)
    found = torch.load(tmp_path / "peer0" / "final", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("number", [0, 2])
def test_of_three_peers_those_with_the_same_data_go_on_without_the_one_with_other_data(processes, tmp_path, number):
    jobs = [
        processes.job(tmp_path, peer, options={"peers": 3}, data_seed=1 + (peer == number), pause=0.02)
        for peer in range(3)
    ]
    odd = jobs.pop(number)
    for times in (1, 2):  # it comes back
        for job in (odd, *jobs):
            job.until(lambda job, times=times: told_apart(job) >= times, 100)
        for job in jobs:
            last = job.records()[-1]
            job.until(lambda job, last=last: exchanged_since(job, last)(), 100)
    end_all(odd, *jobs)
    assert odd.exchanged() == []
    assert {record["used"] for job in jobs for record in job.exchanged()} == {1.0}
    assert_true_penalties(*jobs)


def test_without_weight_training_is_bitwise_the_training_of_one_peer_alone(processes, tmp_path):
    alone = processes.job(tmp_path, 0, options={"peers": 1}, name="alone", updates=60)
    burning = [processes.job(tmp_path, peer, options={"burn_in": 1000}, updates=60) for peer in range(2)]
    off = [
        processes.job(tmp_path, peer, options={"alpha": 0.0}, updates=60, name=f"off{peer}", seed=0)
        for peer in range(2)
    ]
    for job in (alone, *burning, *off):
        assert job.end()["causes"] == {}
    expected = torch.load(tmp_path / "alone" / "final", weights_only=True)
    for name in ("peer0", "off0", "off1"):
        found = torch.load(tmp_path / name / "final", weights_only=True)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(end["metrics"]["sent"] == 0 for end in (job.end() for job in burning))


def test_a_micro_batch_that_one_peer_leaves_out_costs_that_one_alone(processes, tmp_path):
    one, other = (processes.job(tmp_path, peer, skips=[60, 90][:peer]) for peer in range(2))
    one.until(lambda job: len(job.exchanged()) > 90)
    ends = end_all(one, other)
    assert_true_penalties(one, other)
    assert sum(end["causes"].get("batch", 0) for end in ends) <= 2
    assert "lost" not in ends[0]["causes"]


def test_every_worker_of_a_peer_swaps_with_its_counterpart(processes, tmp_path):
    one, other = (processes.job(tmp_path, peer, workers=2) for peer in range(2))
    one.until(lambda job: len(job.exchanged(1)) > FEW)
    os.kill(other.processes[1].pid, signal.SIGKILL)  # as a launcher does, end the others too
    other.kill()
    killed = one.records()[-1]
    other.start()
    for job in (one, other):
        job.until(lambda job: exchanged_since(job, killed)())
    end_all(one, other)
    for rank in range(2):
        one.end(rank)
        assert_true_penalties(one, other, rank=rank)
    for first, second in zip(one.records(0), one.records(1), strict=False):
        assert place(first) == place(second)


@pytest.mark.parametrize(
    ("kind", "options", "plan", "line"),
    [
        ("folder", {"temperature": 2.0}, {}, "was started with temperature=1.0, not 2.0"),
        ("address", {"temperature": 2.0}, {}, "was started with temperature=1.0, not 2.0"),
        ("folder", {}, {"workers": 2}, "was started with workers=1, not 2"),
        ("address", {}, {"workers": 2}, "was started with workers=1, not 2"),
        ("folder", {"exchange": "checkpoint"}, {}, 'was started with exchange="prediction", not nothing'),
    ],
)
def test_a_peer_of_other_terms_is_told_so_at_the_start(processes, tmp_path, free_port, kind, options, plan, line):
    where = {} if kind == "folder" else {"dir": None, "rendezvous": f"tcp://127.0.0.1:{free_port}"}
    one = processes.job(tmp_path, 0, options=where)
    one.until(lambda job: job.records())
    other = processes.job(tmp_path, 1, options={**where, **options}, **plan)
    assert other.processes[0].wait(20)
    assert f"ConfigError: run run {line}; give all peers" in other.output()
    one.stop()
    assert one.end()["causes"] == {}


def test_peers_of_the_same_initial_weights_leave_each_other_out_by_name(processes, tmp_path):
    jobs = [processes.job(tmp_path, peer, seed=7, updates=120) for peer in range(2)]
    for job in jobs:
        assert job.end()["causes"] == {"init": 1}
    assert "peer 1 is left out: it started from the same initial weights as this peer" in jobs[0].output()


def test_peers_that_end_at_the_same_update_have_nothing_to_complain_of(processes, tmp_path):
    jobs = [processes.job(tmp_path, peer, options={"peers": 3}, updates=150) for peer in range(3)]
    for job in jobs:
        assert job.end()["causes"] == {}
        assert len(job.exchanged()) > FEW


@pytest.mark.parametrize("by_address", [False, True])
def test_a_peer_that_ends_earlier_is_no_trouble_to_one_that_trains_on(processes, tmp_path, free_port, by_address):
    options = {"on_error": "fail", **({"rendezvous": f"tcp://127.0.0.1:{free_port}"} if by_address else {})}
    early, late = (processes.job(tmp_path, peer, options=options) for peer in range(2))
    late.until(lambda job: len(job.exchanged()) > FEW)
    early.stop()
    early.end()
    last = late.records()[-1]
    late.until(lambda job: place(job.records()[-1]) > (last["epoch"], last["batch"] + 20 * FEW))
    [end] = end_all(late)
    assert end["metrics"]["incidents"] == 0


def test_the_peer_that_holds_the_meeting_point_comes_back_to_it(processes, tmp_path, free_port):
    options = {"dir": None, "rendezvous": f"tcp://127.0.0.1:{free_port}"}
    one, other = (processes.job(tmp_path, peer, options=options) for peer in range(2))
    other.until(lambda job: len(job.exchanged()) > FEW)
    one.kill()
    killed = other.records()[-1]
    other.until(lambda job: len([r for r in job.records() if place(r) > place(killed)]) > 50)
    one.start()
    for job in (one, other):
        job.until(lambda job: exchanged_since(job, killed)())
    end_all(one, other)
    assert_true_penalties(one, other)
    assert max(record["seconds"] for record in other.records() if place(record) > place(killed)) < 2.0


def test_a_peer_that_was_stopped_and_replaced_exchanges_no_more(processes, tmp_path):
    one, other = (processes.job(tmp_path, peer, options={"timeout": 1.0}) for peer in range(2))
    one.until(lambda job: len(job.exchanged()) > FEW)
    old = list(other.processes)
    other.signal(signal.SIGSTOP)
    one.until(lambda job: job.records()[-1]["causes"].get("lost"))
    stopped = one.records()[-1]
    other.start()
    one.until(lambda job: exchanged_since(job, stopped)())
    os.kill(old[0].pid, signal.SIGCONT)
    one.until(lambda job: "was started again elsewhere" in other.output())
    assert one.records()[-1]["used"] == 1
    before = one.records()[-1]
    one.until(lambda job: exchanged_since(job, before)())
    assert one.records()[-1]["causes"]["lost"] == 1


def test_status_knows_peers_that_publish_nothing(processes, tmp_path):
    one, other = (processes.job(tmp_path, peer) for peer in range(2))
    one.until(lambda job: len(job.exchanged()) > FEW)
    report = look(Survey(str(tmp_path / "store"), RUN, patience=10.0))
    assert [(row.state, row.why) for row in report.peers] == [("alive", ""), ("alive", "")]
    end_all(one, other)
    report = look(Survey(str(tmp_path / "store"), RUN, patience=10.0))
    assert [(row.state, row.why) for row in report.peers] == [("finished", ""), ("finished", "")]


def test_one_that_has_fallen_behind_by_epochs_goes_on_where_the_others_are(processes, tmp_path):
    one = processes.job(tmp_path, 0, accumulate=2, per_epoch=60)
    one.until(lambda job: len(job.records()) > 200)
    other = processes.job(tmp_path, 1, accumulate=2, per_epoch=60)
    for job in (one, other):
        job.until(lambda job: len(job.exchanged()) > FEW)
    ends = end_all(one, other)
    assert_true_penalties(one, other)
    assert ends[0]["causes"].keys() <= {"lost"}  # when the other ends first
    assert other.exchanged()[0]["epoch"] > 3
    assert len(other.records()) < other.exchanged()[0]["epoch"] * 60 - 100


def test_peers_whose_updates_differ_in_size_exchange_all_the_same(processes, tmp_path):
    jobs = [processes.job(tmp_path, peer, accumulate=2 * (1 + peer), per_epoch=37) for peer in range(2)]
    for job in jobs:
        job.until(lambda job: len(job.exchanged()) > 50)
    end_all(*jobs)
    assert_true_penalties(*jobs)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ({"epoch": 10**6}, "late"),  # those that are there go nowhere to meet one that is not
        ({"generation": 2**62}, "format"),
        ({"step": 2**62}, "format"),
        ({"batch": 2**62}, "format"),
    ],
)
def test_what_a_document_says_neither_ends_a_training_nor_costs_it_data(processes, tmp_path, said, cause):
    job = processes.job(tmp_path, 0)
    peers = tmp_path / "store" / RUN / "peers"
    job.until(lambda job: (peers / "0" / "meeting.json").exists())
    ours = json.loads((peers / "0" / "meeting.json").read_bytes())
    (peers / "1").mkdir()

    def speak(job):
        ours["counter"] += 1
        alive = {"peer": 1, "state": "ready", "leader": 0, "init_hash": "f" * 64, "proposal": None}
        (tmp_path / "document").write_text(json.dumps({**ours, **alive, **said}))
        (tmp_path / "document").replace(peers / "1" / "meeting.json")
        return job.records() and job.records()[-1]["causes"].get(cause)

    job.until(speak)
    before = job.records()[-1]["batch"]
    job.until(lambda job: job.records()[-1]["batch"] > before + FEW)
    [end] = end_all(job)
    assert end["causes"].keys() == {cause}
    assert not any("skip" in record for record in job.records())


def test_a_fault_of_ours_costs_the_exchange_and_not_the_training(tmp_path, monkeypatch):
    def no_thread(*given):
        raise RuntimeError("can't start new thread")

    proposal = Proposal(generation=1, members=(0, 1), host="127.0.0.1", port=1, start=Position(1, 50), lead=5)
    config = CodistillConfig(exchange="prediction", dir=str(tmp_path / "store"), timeout=5.0)
    incidents = Incidents(fatal=False)
    exchange = PredictionExchange(config, Workers(timeout=10), tmp_path, incidents)
    exchange.start(Identity("f" * 64, "a" * 64), {}, 0, lambda state: None)
    monkeypatch.setattr(Rendezvous, "offer", lambda self: proposal)
    monkeypatch.setattr(predictions, "Forming", no_thread)
    for batch in range(2):
        exchange.begin_update(batch, willing=True)
        assert exchange.begin_batch(Position(1, batch)) is None
    assert incidents.counts == {"internal": 1}
    assert not codistill_threads()
