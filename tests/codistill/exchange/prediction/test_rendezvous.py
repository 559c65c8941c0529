"""Posts, boards, and how peers that post become a group: several rendezvous in one process, told where they are."""

import dataclasses
import json
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from codistill import CodistillConfig, ConfigError
from codistill.exchange.errors import Refused, StorageError
from codistill.exchange.membership import Membership
from codistill.exchange.prediction import board, forming, rendezvous
from codistill.exchange.prediction.board import StoreBoard, TcpBoard, own_address
from codistill.exchange.prediction.forming import Forming, Patience, State
from codistill.exchange.prediction.posts import FAR, Post, Proposal, from_words, to_words
from codistill.exchange.prediction.rendezvous import Rendezvous, Standing
from codistill.exchange.protocol import Position
from codistill.exchange.store import RunStore
from codistill.meters import Incidents
from tests.fixtures_peers import RUN, codistill_threads, until
from tests.fixtures_store import memory_objects  # noqa: F401

# ruff: noqa: F811

TERMS = {"peers": 3, "loss": "kl", "workers": 1}
PROPOSAL = Proposal(generation=4, members=(0, 2, 1023), host="10.0.0.1", port=29500, start=Position(3, 1200), lead=40)
POST = Post(
    run=RUN,
    peer=1,
    incarnation=2,
    counter=7,
    state="ready",
    terms=TERMS,
    init_hash="a" * 64,
    epoch=3,
    batch=1160,
    step=4,
    pace=8000,
    generation=3,
    leader=0,
    proposal=PROPOSAL,
)


def standing(batch=0, **changes):
    """What a training thread says that is at `batch` and in no group."""
    return Standing(
        **{
            "position": Position(1, batch),
            "batches": batch,
            "step": 1,
            "generation": 0,
            "members": (),
            "forming": False,
            "lost": -float("inf"),
            "ready_from": -float("inf"),
            "avoided": frozenset(),
            "told": time.monotonic(),
            **changes,
        }
    )


class Job:
    """One peer's rendezvous on a store, and a training thread that says what the test wants."""

    def __init__(self, objects, tmp_path, peer, *, terms=TERMS, start=None):
        store = RunStore(objects, RUN)
        save_dir = tmp_path / f"peer{peer}"
        save_dir.mkdir(exist_ok=True)
        membership = Membership(store, peer, f"{peer:064x}", TERMS, save_dir)
        membership.join()
        self.incidents = Incidents(fatal=False)
        self.rendezvous = Rendezvous(
            StoreBoard(store, membership, peer),
            run=RUN,
            peer=peer,
            peers=3,
            terms=terms,
            init_hash=f"{peer if start is None else start:064x}",
            incidents=self.incidents,
        )
        self.said = standing()
        self.rendezvous.start()

    def say(self, batch=0, **changes):
        self.said = standing(batch, **changes)
        self.rendezvous.tell(self.said)

    def enter(self, proposal, **changes):
        """Take up a group that has formed."""
        self.say(proposal.start.batch, generation=proposal.generation, members=proposal.members, **changes)

    def offered(self):
        self.rendezvous.tell(dataclasses.replace(self.said, told=time.monotonic()))
        return self.rendezvous.offer()


@pytest.fixture
def jobs(memory_objects, tmp_path, monkeypatch):
    """Makes `Job`s on one store; all posts are quick."""
    for name, seconds in (("BEAT", 0.02), ("SLOW_BEAT", 0.05), ("SETTLE", 0.2), ("PRESENT", 0.6), ("CLAIM", 0.1)):
        monkeypatch.setattr(rendezvous, f"{name}_SECONDS", seconds)
    before, made = codistill_threads(), []

    def make(peer, **changes):
        made.append(Job(memory_objects, tmp_path, peer, **changes))
        return made[-1]

    yield make
    for job in made:
        job.rendezvous.close(5)
    assert codistill_threads() <= before


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(params=["store", "tcp"])
def boards(request, memory_objects, tmp_path, port):
    """Makes boards of one run; peer 0's must come first."""
    made = []

    def make(peer, terms=TERMS):
        if request.param == "tcp":
            made.append(TcpBoard(f"tcp://127.0.0.1:{port}", RUN, peer, terms))
            made[-1].start()
        else:
            membership = Membership(RunStore(memory_objects, RUN), peer, "a" * 64, terms, tmp_path / str(peer))
            membership.join()
            made.append(StoreBoard(RunStore(memory_objects, RUN), membership, peer))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_post_comes_back_as_it_was_written():
    assert Post.parse(POST.to_json(), RUN, 1) == POST
    alone = dataclasses.replace(POST, proposal=None)
    assert Post.parse(alone.to_json(), RUN, 1) == alone


def test_a_proposal_reaches_the_other_workers_as_integers():
    many = dataclasses.replace(PROPOSAL, members=tuple(range(1024)), host="h" * 253)
    for proposal in (PROPOSAL, many):
        words = to_words(proposal.to_json())
        assert all(-(2**63) <= word < 2**63 for word in words)
        assert Proposal.parse(from_words(words)) == proposal
    assert len(to_words(b"")) == len(to_words(many.to_json()))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"state": "asleep"}, "format"),
        ({"step": 0}, "format"),
        ({"pace": -1}, "format"),
        ({"batch": 2**63}, "format"),
        ({"batch": 1.5}, "format"),
        ({"batch": True}, "format"),
        ({"terms": {str(number): 0 for number in range(2000)}}, "format"),
        ({"terms": []}, "format"),
        ({"init_hash": "A" * 64}, "format"),
        ({"proposal": {}}, "format"),
        ({"proposal": {"generation": 1}}, "format"),
        ({"surplus": 0}, "format"),
        ({"format": 2}, "format"),
        ({"run": "another"}, "run"),
        ({"peer": 2}, "peer"),
        ({"terms": {"text": "x" * 40_000}}, "size"),
    ],
)
def test_a_post_that_is_none_is_refused(changes, cause):
    data = json.dumps({**json.loads(POST.to_json()), **changes}).encode()
    with pytest.raises(Refused) as refusal:
        Post.parse(data, RUN, 1)
    assert refusal.value.cause == cause


@pytest.mark.parametrize(
    "changes",
    [
        {"members": "0"},
        {"members": "1,0"},
        {"members": "0,0"},
        {"members": "0,1,"},
        {"members": ",".join(map(str, range(1025)))},
        {"host": "a b"},
        {"host": ""},
        {"host": "h\n"},
        {"port": 0},
        {"generation": 0},
        {"lead": None},
    ],
)
def test_a_proposal_that_is_none_is_refused(changes):
    plain = json.loads(PROPOSAL.to_json())
    with pytest.raises(Refused, match="proposal"):
        Proposal.parse(json.dumps({**plain, **changes}).encode())


def test_everybody_reads_what_everybody_posts(boards):
    first, second = boards(0), boards(1)
    assert first.join()
    assert second.join()
    assert second.read(0) is None
    first.post(b'{"a":1}')
    first.post(b'{"a":2}')
    second.post(b"{}")
    assert second.read(0) == b'{"a":2}'
    assert first.read(1) == b"{}"
    assert first.read(2) is None


def test_who_comes_later_with_the_same_number_has_it(boards):
    first, second = boards(0), boards(1)
    assert first.join()
    assert second.join()
    assert not second.superseded()
    later = boards(1)
    assert later.join()
    assert second.superseded()
    assert not later.superseded()
    assert later.incarnation > second.incarnation
    assert not first.superseded()


def test_other_terms_are_refused_in_one_line(boards):
    assert boards(0).join()
    with pytest.raises(ConfigError) as refusal:
        boards(1, {**TERMS, "loss": "ce"}).join()
    assert str(refusal.value) == (
        "run run was started with loss=kl, not ce; "
        "give all peers of a run the same options, or a new --codistill-run-id"
    )


def test_a_port_that_is_taken_is_told_in_one_line(monkeypatch, port):
    monkeypatch.setattr(board, "BIND_SECONDS", 0.2)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(ConfigError) as refusal:
            TcpBoard(f"tcp://127.0.0.1:{port}", RUN, 0, TERMS).start()
    assert str(refusal.value) == (
        f"--codistill-rendezvous tcp://127.0.0.1:{port}: port {port} is not free on this machine; "
        "name another one, the same for all peers"
    )


def test_a_board_is_reached_again_when_its_host_comes_back(port):
    host, other = (TcpBoard(f"tcp://127.0.0.1:{port}", RUN, peer, TERMS) for peer in range(2))
    with pytest.raises(StorageError, match="nobody answers at 127"):
        other.join()
    host.start()
    assert other.join()
    host.close()
    with pytest.raises(StorageError, match="broke off"):
        for _ in range(3):  # the first words may still go out
            other.post(b"{}")
            other.read(0)
    host.start()
    assert other.join()
    other.post(b"{}")
    assert host.join()
    assert host.read(1) == b"{}"
    other.close()
    host.close()
    with socket.socket() as again:
        again.bind(("", port))


def test_the_address_is_that_of_the_interface_that_gloo_is_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address() == "127.0.0.1"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "a-name-that-nobody-knows.invalid")
    assert own_address() == "127.0.0.1"


def test_peers_that_are_ready_are_offered_one_group_beyond_the_foremost(jobs):
    first, second = jobs(0), jobs(1)
    first.say(100, step=4)
    second.say(250, step=6)
    offer = until(first.offered)
    assert until(second.offered) == offer
    assert offer.members == (0, 1)
    assert offer.generation == 1
    assert offer.start.epoch == 1
    assert offer.start.batch >= 250 + 3 * 6
    assert offer.start.batch % 6 == 0
    assert offer.lead == offer.start.batch - 250
    assert first.incidents.total == second.incidents.total == 0


def test_a_later_epoch_is_further_whatever_the_batch(jobs):
    first, second = jobs(0), jobs(1)
    first.say(1000)
    second.say(0, position=Position(2, 5))
    assert until(first.offered).start == Position(2, 8)


def test_a_newcomer_gets_a_group_of_all_with_a_larger_generation(jobs):
    first, second = jobs(0), jobs(1)
    first.say()
    second.say()
    offer = until(first.offered)
    for job in (first, second):
        job.enter(offer)
    third = jobs(2)
    third.say()
    wider = until(third.offered)
    assert wider.members == (0, 1, 2)
    assert wider.generation > offer.generation
    assert until(first.offered) == until(second.offered) == wider
    for job in (first, second, third):
        job.enter(wider)
    time.sleep(0.5)
    assert not any(job.offered() for job in (first, second, third))


def test_a_generation_that_nobody_can_have_reached_is_not_counted_on_from(jobs, memory_objects):
    stranger = dataclasses.replace(POST, peer=2, state="away", generation=FAR, proposal=None)
    RunStore(memory_objects, RUN).put_meeting(2, stranger.to_json())
    first, second = jobs(0), jobs(1)
    first.say()
    second.say()
    offer = until(first.offered)
    assert until(second.offered) == offer
    assert offer.generation == 1


def test_nobody_is_asked_who_is_not_ready(jobs):
    first, second, third = (jobs(peer) for peer in range(3))
    first.say()
    second.say()
    third.say(ready_from=time.monotonic() + 1000)
    assert until(first.offered).members == (0, 1)
    assert third.offered() is None


def test_one_that_trains_on_never_seems_away(jobs, memory_objects):
    store, states = RunStore(memory_objects, RUN), []
    first, second = jobs(0), jobs(1)
    second.say()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        first.say(ready_from=time.monotonic())  # a beat may well have begun before
        data = store.meeting(0)
        states += [Post.parse(data, RUN, 0).state] if data is not None else []
    assert states[-1] == "ready"
    assert "away" not in states[states.index("ready") :]


def test_nobody_is_asked_whose_training_stands_still(jobs, monkeypatch):
    monkeypatch.setattr(rendezvous, "QUIET_SECONDS", 0.3)
    first, second = jobs(0), jobs(1)
    second.say(told=time.monotonic() - 1)  # validation, say; and it goes on posting
    first.say()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        first.said = dataclasses.replace(first.said, told=time.monotonic())
        assert first.offered() is None
        time.sleep(0.02)


def test_survivors_form_a_group_without_the_one_that_posts_no_more(jobs):
    first, second, third = (jobs(peer) for peer in range(3))
    for job in (first, second, third):
        job.say()
    offer = until(lambda: (found := second.offered()) and len(found.members) == 3 and found)
    for job in (first, second, third):
        job.enter(offer)
    first.rendezvous._stopping = first.rendezvous._gone = True  # as if killed: it does not even say goodbye
    first.rendezvous._woken.set()
    first.rendezvous._thread.join(5)
    lost = time.monotonic()
    for job in (second, third):
        job.say(offer.start.batch + 5, generation=offer.generation, lost=lost)
    again = until(second.offered, 3)
    assert again.members == (1, 2)
    assert again.generation > offer.generation
    assert until(third.offered) == again


def test_one_that_has_gone_is_left_out_at_once(jobs):
    first, second = jobs(0), jobs(1)
    second.say()
    first.say()
    until(first.offered)
    assert until(second.offered)
    first.rendezvous.close(5)
    began = time.monotonic()
    until(lambda: second.offered() is None)
    assert time.monotonic() - began < rendezvous.PRESENT_SECONDS / 2, "as one that fell silent, not as one that left"


@pytest.mark.parametrize(
    ("changes", "cause", "line"),
    [
        (
            {"start": 0},
            "init",
            "it started from the same initial weights as this peer; give each peer its own seed, or, if both start "
            "from one checkpoint, some weights of its own (a fresh head)",
        ),
        ({"terms": {**TERMS, "workers": 2}}, "terms", "run run was started with workers=2, not 1"),
    ],
)
def test_one_that_does_not_fit_is_an_incident_once_and_left_out(jobs, caplog, changes, cause, line):
    first, second, third = jobs(0), jobs(1, **changes), jobs(2)
    for job in (first, second, third):
        job.say()
    assert until(first.offered).members == (0, 2)
    time.sleep(0.2)
    assert first.incidents.counts == {cause: 1}
    assert second.offered() is None
    assert f"peer 1 is left out: {line}" in caplog.text


def test_one_whose_word_cannot_be_read_is_an_incident_once_and_keeps_nobody_else_apart(jobs, monkeypatch):
    plain = StoreBoard.read

    def forbidden(board, peer):
        if peer == 2:
            raise StorageError("storage", "fails on purpose")
        return plain(board, peer)

    monkeypatch.setattr(StoreBoard, "read", forbidden)
    first, second = jobs(0), jobs(1)
    for job in (first, second):
        job.say()
    assert until(lambda: first.offered() and second.offered()).members == (0, 1)
    until(lambda: first.incidents.counts == second.incidents.counts == {"storage": 1})


def test_those_who_avoid_another_are_offered_a_group_without_it(jobs):
    first, second, third = (jobs(peer) for peer in range(3))
    third.say()
    for job in (first, second):
        job.say(avoided=frozenset({2}))
    assert until(lambda: first.offered() and second.offered()).members == (0, 1)


def test_a_later_start_of_the_same_peer_takes_its_place(jobs):
    old = jobs(1)
    first, new = jobs(0), jobs(1)
    for job in (old, first, new):
        job.say()
    until(lambda: old.rendezvous.retired)
    assert old.incidents.counts == {"superseded": 1}
    until(first.offered)
    assert until(new.offered)
    assert old.offered() is None


def test_a_board_that_nobody_has_reached_yet_is_no_incident(monkeypatch, port):
    monkeypatch.setattr(rendezvous, "BEAT_SECONDS", 0.02)
    incidents = Incidents(fatal=False)
    meeting = Rendezvous(
        TcpBoard(f"tcp://127.0.0.1:{port}", RUN, 1, TERMS),
        run=RUN,
        peer=1,
        peers=2,
        terms=TERMS,
        init_hash="a" * 64,
        incidents=incidents,
    )
    meeting.start()
    meeting.tell(standing())
    time.sleep(0.3)
    assert incidents.total == 0
    monkeypatch.setattr(rendezvous, "UNREACHABLE_SECONDS", 0.0)
    until(lambda: incidents.counts["storage"])
    meeting.close(5)


def test_a_group_that_nobody_else_comes_to_can_be_abandoned_at_any_time(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    server = board.serve()
    proposal = dataclasses.replace(PROPOSAL, members=(0, 1), host="127.0.0.1", port=server.port)
    before = threading.active_count()
    waiting = Forming(proposal, 0, 0)
    waiting.wait(0.2)
    assert waiting.state is State.PENDING
    waiting.abandon()
    waiting.wait(5)
    assert waiting.state is State.FAILED
    until(lambda: threading.active_count() <= before)
    lonely = Forming(dataclasses.replace(proposal, port=1), 0, 0)
    lonely.wait(10)
    assert lonely.state is State.FAILED
    assert "nobody answers at 127.0.0.1:1" in lonely.why


def test_a_host_whose_name_is_none_makes_the_group_fail():
    lost = Forming(dataclasses.replace(PROPOSAL, members=(0, 1), host="a..b"), 0, 0)
    lost.wait(10)
    assert lost.state is State.FAILED
    assert lost.why


def test_two_that_come_are_connected_and_whoever_is_not_taken_is_closed(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    server = board.serve()
    proposal = dataclasses.replace(PROPOSAL, members=(0, 1), host="127.0.0.1", port=server.port)
    both = [Forming(proposal, peer, 0) for peer in range(2)]
    for one in both:
        one.wait(20)
        assert one.state is State.READY
    group = both[0].take()
    both[1].abandon()
    assert both[1].state is State.FAILED
    group.close()


def test_waits_in_vain_are_bounded_one_by_one_and_as_a_share_of_the_run(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    patience = Patience(timeout=300.0)
    assert patience.limit() == forming.WAIT_SECONDS
    assert patience.pause() == 0
    patience.spend(45)
    assert patience.limit() == pytest.approx(15)
    patience.spend(15)
    assert patience.limit() == 0
    assert patience.pause() == pytest.approx(50)  # until 5 seconds are a tenth of it
    now += 50
    assert patience.limit() == pytest.approx(5)
    assert patience.pause() == pytest.approx(0)
    now += 10_000
    assert patience.limit() == forming.WAIT_SECONDS
    assert Patience(timeout=2.0).limit() == 2


def test_a_wait_stays_below_the_time_out_of_the_host_s_own_group(tmp_path):
    assert forming.host_timeout() is None
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    try:
        assert forming.host_timeout() == 30
        assert Patience(timeout=300.0).limit() == 10
    finally:
        dist.destroy_process_group()


def test_peers_whose_updates_take_long_meet_all_the_same(jobs, monkeypatch):
    monkeypatch.setattr(rendezvous, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "PACE_SECONDS", 0.2)
    pair = jobs(0), jobs(1)
    for update in range(12):
        if all(job.rendezvous.offer() for job in pair):
            return
        for job in pair:
            job.say(8 * update, step=8)
        time.sleep(0.4)
    pytest.fail("no group was offered as an update began")


def silent_server():
    """Accepts connections, as the kernel does for a process that is stopped, and never answers."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def test_a_rendezvous_that_never_answers_does_not_keep_training_from_beginning(monkeypatch, tmp_path):
    monkeypatch.setattr(board, "CONNECT_SECONDS", 0.2)
    before = codistill_threads()
    with silent_server() as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        config = CodistillConfig(exchange="prediction", rendezvous=address, peer=1)
        began = time.monotonic()
        found, _ = board.open_board(config, TERMS, tmp_path, Incidents(fatal=False))
        assert time.monotonic() - began < 5
        assert found.incarnation == 0
    until(lambda: codistill_threads() <= before)


def test_terms_that_cannot_be_read_are_the_rendezvous_s_fault_and_read_again(monkeypatch, port):
    one, other = (TcpBoard(f"tcp://127.0.0.1:{port}", RUN, peer, TERMS) for peer in range(2))
    one.start()
    spoilt = board.reach("127.0.0.1", port, 5)
    spoilt.set(f"{RUN}/terms", "{")
    for _ in range(2):
        with pytest.raises(StorageError, match="terms"):
            other.join()
    spoilt.set(f"{RUN}/terms", json.dumps(TERMS))
    assert other.join()
    assert other.incarnation == 1
    one.close()
    other.close()
