"""Groups over real gloo connections: threads of this process as members where none dies, processes where one does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from codistill.exchange.prediction import in_step
from codistill.exchange.prediction.forming import Patience
from codistill.exchange.prediction.group import Group, GroupLost, Header, MemberLeft, Mismatch
from codistill.exchange.protocol import Position
from codistill.meters import Incidents
from tests.fixtures_peers import data_parallel, until

MEBI = 2**20
ROOT = str(Path(__file__).resolve().parents[4])


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)


def join(server: dist.TCPStore, me: int, members: Sequence[int], generation: int = 1, timeout: float = 20) -> Group:
    """Form a group with a connection of one's own, as another process would."""
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
    return Group(dist.PrefixStore(f"{generation}/0", store), members, me, generation, timeout)


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each call gives or raises, all made at once."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def form(server: dist.TCPStore, members: Sequence[int], generation: int = 1) -> list[Group]:
    groups = together([lambda me=me: join(server, me, members, generation) for me in members])
    assert all(isinstance(group, Group) for group in groups), groups
    return groups


@pytest.fixture
def three(server: dist.TCPStore) -> Iterator[list[Group]]:
    groups = form(server, (0, 1, 2))
    yield groups
    for group in groups:
        group.close()


def header(payload: Tensor, batch: int = 0, **changes: Any) -> Header:
    return Header(**{"epoch": 3, "batch": batch, "shape": (4, 5), "dtype": "float32", "topk": 0, "checksum": -7,
                     "size": payload.numel(), **changes})  # fmt: skip


def payload(peer: int, size: int) -> Tensor:
    return torch.randint(256, (size,), generator=torch.Generator().manual_seed(peer)).to(torch.uint8)


def exchange(groups: Sequence[Group], payloads: Sequence[Tensor], headers: Sequence[Header]) -> list[Any]:
    return together([
        lambda group=group, sent=sent, shown=shown: group.exchange(shown, sent, 20)
        for group, sent, shown in zip(groups, payloads, headers, strict=True)
    ])  # fmt: skip


def test_a_failure_without_a_word_is_told_by_its_type() -> None:
    class Broken:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError

    with pytest.raises(GroupLost) as lost:
        Group(Broken(), [7, 8], 7, 1, 1)
    assert str(lost.value) == "the group of peers 7, 8 could not form: RuntimeError"


def test_members_with_any_numbers_get_each_others_payloads(server: dist.TCPStore) -> None:
    groups = form(server, (4, 1, 7))
    sent = {peer: payload(peer, 1000) for peer in (4, 1, 7)}
    found = exchange(groups, list(sent.values()), [header(one) for one in sent.values()])
    for me, theirs in zip((4, 1, 7), found, strict=True):
        assert set(theirs) == {4, 1, 7} - {me}
        assert all(torch.equal(theirs[peer], sent[peer]) for peer in theirs)


@pytest.mark.parametrize("size", [0, 1, 5, 4 * MEBI, 9 * MEBI + 3])
def test_payloads_of_every_size_arrive_and_are_counted(three: list[Group], size: int) -> None:
    before = [(group.sent, group.received) for group in three]
    sent = [payload(peer, size) for peer in range(3)]
    for batch in range(2):
        found = exchange(three, sent, [header(one, batch) for one in sent])
        for me, theirs in enumerate(found):
            assert all(torch.equal(theirs[peer], sent[peer]) for peer in {0, 1, 2} - {me})
    for group, counts in zip(three, before, strict=True):
        assert (group.sent - counts[0], group.received - counts[1]) == (2 * 2 * (128 + size),) * 2


DIFFERENCES = {
    "epoch": ({"epoch": 4}, "batch", "peer 1 is at epoch 4, batch 0, we are at epoch 3, batch 0"),
    "batch": ({"batch": 17}, "batch", "peer 1 is at epoch 3, batch 17, we are at epoch 3, batch 0"),
    "everything": (
        {"batch": 2, "shape": (1,), "dtype": "float16", "topk": 9, "checksum": 0},
        "batch",
        "peer 1 is at epoch 3, batch 2, we are at epoch 3, batch 0",
    ),
    "shape": (
        {"shape": (4, 6)},
        "shape",
        "peer 1 has logits of shape (4, 6) at epoch 3, batch 0, we have (4, 5)",
    ),
    "dimensions": (
        {"shape": (2, 2, 5)},
        "shape",
        "peer 1 has logits of shape (2, 2, 5) at epoch 3, batch 0, we have (4, 5)",
    ),
    "dtype": (
        {"dtype": "bfloat16"},
        "format",
        "peer 1 sends all logits as bfloat16 at epoch 3, batch 0, we send all logits as float32",
    ),
    "topk": (
        {"topk": 8},
        "format",
        "peer 1 sends the 8 largest logits as float32 at epoch 3, batch 0, we send all logits as float32",
    ),
    "checksum": (
        {"checksum": 8},
        "inputs",
        "peer 1 has other inputs at epoch 3, batch 0: its data, augmentation or mixup differ from ours",
    ),
    "size": ({}, "format", "peer 1 sends 50 bytes at epoch 3, batch 0, we send 100"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_all_members_see_what_differs_and_the_group_stays_good(three: list[Group], name: str) -> None:
    changes, cause, message = DIFFERENCES[name]
    sent = [payload(peer, 50 if name == "size" and peer == 1 else 100) for peer in range(3)]
    headers = [header(one, **(changes if peer == 1 else {})) for peer, one in enumerate(sent)]
    first, second, third = exchange(three, sent, headers)
    for error in (first, third):
        assert isinstance(error, Mismatch)
        assert (error.cause, str(error)) == (cause, message)
        assert error.front == (changes.get("epoch", 3), changes.get("batch", 0))
    assert isinstance(second, Mismatch)
    assert second.cause == cause
    assert str(second).startswith("peer 0 ")
    assert "; peer 2 " in str(second)

    sent = [payload(peer, 60) for peer in range(3)]
    found = exchange(three, sent, [header(one, 1) for one in sent])
    assert [sorted(theirs) for theirs in found] == [[1, 2], [0, 2], [0, 1]]
    assert torch.equal(found[0][1], sent[1])


def test_logits_of_many_dimensions_have_a_header_too(three: list[Group]) -> None:
    sent = [payload(peer, 9) for peer in range(3)]
    shapes = [{"shape": (2, 3, 4, 5, 6, 7)}] * 3
    found = exchange(three, sent, [header(one, **changes) for one, changes in zip(sent, shapes, strict=True)])
    assert torch.equal(found[0][2], sent[2])


def test_integers_that_no_member_would_show_are_a_header_for_a_message_only() -> None:
    odd = Header.of([2**62, -1, -5, 2**62, -1, 7, 99, -3, 0, -(2**63)])
    assert (odd.epoch, odd.batch, odd.shape, odd.dtype) == (2**62, -1, (2**62, 7), "unknown")


def test_a_member_that_closes_ends_the_others_exchange_at_once(three: list[Group]) -> None:
    def close_soon() -> None:
        time.sleep(0.3)
        three[2].close()

    began = time.monotonic()
    sent = payload(0, 10)
    errors = together([
        lambda: three[0].exchange(header(sent), sent, 30),
        lambda: three[1].exchange(header(sent), sent, 30),
        close_soon,
    ])  # fmt: skip
    assert time.monotonic() - began < 5
    assert isinstance(errors[0], GroupLost)
    assert isinstance(errors[1], GroupLost)
    assert "peer 2 closed the connection" in {str(errors[0]), str(errors[1])}
    with pytest.raises(GroupLost, match="the group is closed"):
        three[0].exchange(header(sent), sent, 30)
    three[2].close()


def test_a_member_that_says_goodbye_is_known_to_have_left_on_purpose(three: list[Group]) -> None:
    one = payload(0, 10)
    calls = [lambda group=group: group.exchange(header(one), one, 20) for group in three[:2]]
    *found, _ = together([*calls, lambda: three[2].leave(20)])
    assert [type(error) for error in found] == [MemberLeft] * 2
    assert str(found[0]) == "peer 2 left the group"


def test_members_that_end_together_wait_for_nobody_and_one_that_ends_alone_not_for_long(server: dist.TCPStore) -> None:
    began = time.monotonic()
    together([lambda group=group: group.leave(20) for group in form(server, (0, 1))])
    assert time.monotonic() - began < 10
    alone, other = form(server, (0, 1), generation=2)
    began = time.monotonic()
    alone.leave(0.5)
    assert time.monotonic() - began < 5
    other.close()
    alone.leave(0.5)


def test_a_member_that_does_not_come_to_an_exchange_costs_the_time_allowed(three: list[Group]) -> None:
    sent = payload(0, 10)
    began = time.monotonic()
    errors = together([lambda group=group: group.exchange(header(sent), sent, 0.5) for group in three[:2]])
    assert 0.4 < time.monotonic() - began < 3
    assert all(isinstance(error, GroupLost) for error in errors)
    assert "peer 2 did not answer in time" in {str(error) for error in errors}
    with pytest.raises(GroupLost):
        three[2].exchange(header(sent), sent, 20)


def test_a_member_that_never_comes_is_named_in_time(server: dist.TCPStore) -> None:
    began = time.monotonic()
    errors = together([lambda me=me: join(server, me, (0, 1, 3), timeout=0.5) for me in (0, 3)])
    assert time.monotonic() - began < 3
    wanted = "the group of peers 0, 1, 3 could not form: peer 1 did not come in time"
    assert [(type(error), str(error)) for error in errors] == [(GroupLost, wanted)] * 2


def test_a_member_that_came_and_went_does_not_hold_up_the_others_for_ever(server: dist.TCPStore) -> None:
    server.set("1/0/here/1", "1")
    began = time.monotonic()
    with pytest.raises(GroupLost):
        join(server, 0, (0, 1), timeout=0.5)
    assert time.monotonic() - began < 3


def test_members_of_different_generations_do_not_form_a_group(server: dist.TCPStore) -> None:
    def enter(me: int) -> Group:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        return Group(dist.PrefixStore("same", store), (0, 1), me, 5 + me, 5)

    assert all(isinstance(error, GroupLost) for error in together([lambda: enter(0), lambda: enter(1)]))


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(4).byte(), torch.zeros(5, 1).byte()])
def test_a_payload_that_is_not_as_described_is_an_error_before_anybody_hears_of_it(
    three: list[Group], wrong: Tensor
) -> None:
    with pytest.raises(ValueError, match="not 5 bytes"):
        three[0].exchange(header(payload(0, 5)), wrong, 20)
    sent = [payload(peer, 5) for peer in range(3)]
    assert all(isinstance(found, dict) for found in exchange(three, sent, [header(one) for one in sent]))


def resources() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_groups_formed_and_discarded_leave_nothing_behind(server: dist.TCPStore) -> None:
    def once(generation: int) -> None:
        groups = form(server, (0, 1), generation)
        sent = payload(0, 1000)
        if generation % 2:
            exchange(groups, [sent, sent], [header(sent)] * 2)
        else:
            with pytest.raises(GroupLost):
                groups[0].exchange(header(sent), sent, 0.01)
        for group in groups:
            group.close()

    once(1)
    before = resources()
    for generation in range(2, 22):
        once(generation)
    until(lambda: all(now <= then for now, then in zip(resources(), before, strict=True)))


_MEMBERS = """
import json, os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from codistill.exchange.prediction.group import *

number, port = int(sys.argv[1]), int(sys.argv[2])
code = compile(sys.stdin.read(), "member", "exec")

def connect():
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))

def join(members, generation=1):
    return Group(dist.PrefixStore(str(generation), store), members, me, generation, 60)

def header(batch):
    return Header(1, batch, (4, 5), "float32", 0, 0, len(sent))

def lost(seconds, group, batch):
    began = time.monotonic()
    try:
        group.exchange(header(batch), sent, seconds)
    except GroupLost:
        return time.monotonic() - began

ids = {}
for me in range(number):
    child = os.fork()
    if child == 0:
        store, answer = connect(), {}
        sent = torch.full((2_000_000,), me, dtype=torch.uint8)
        exec(code)
        os.write(1, (json.dumps([me, answer]) + chr(10)).encode())
        sys.exit(0)
    ids[child] = me
ends = {}
while len(ends) < number:
    child, status = os.waitpid(-1, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        connect().wait(["go on"])
        os.kill(child, signal.SIGCONT)
    else:
        ends[ids[child]] = os.waitstatus_to_exitcode(status)
os.write(1, json.dumps(["ends", ends]).encode())
"""


def processes(code: str, number: int, port: int) -> dict[Any, Any]:
    """What so many processes that run `code` leave in the dict `answer`, by member, and how they have ended.

    They know `me`, and how to `join` a group and to be `lost`. One that stops itself is resumed once "go on" is set in
    the `store`.
    """
    runner = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _MEMBERS, str(number), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, errors = runner.communicate(code, timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
    assert runner.returncode == 0, errors
    return dict(json.loads(line) for line in output.splitlines())


def test_a_member_killed_between_header_and_payload_is_noticed_at_once_and_the_others_form_anew(
    server: dist.TCPStore,
) -> None:
    code = """
group = join((0, 1, 2))
group.exchange(header(0), sent, 30)
if me == 2:
    group._meet(header(1), time.monotonic() + 30)
    os.kill(os.getpid(), signal.SIGKILL)
answer["lost"] = lost(60, group, 1)
found = join((0, 1), 2).exchange(header(2), sent, 30)
answer["found"] = {peer: int(theirs.float().mean()) for peer, theirs in found.items()}
"""
    found = processes(code, 3, server.port)
    assert found["ends"] == {"0": 0, "1": 0, "2": -signal.SIGKILL}
    assert found[0]["lost"] < 10
    assert found[1]["lost"] < 10
    assert (found[0]["found"], found[1]["found"]) == ({"1": 1}, {"0": 0})


def test_a_stopped_member_costs_the_time_allowed_and_finds_out_when_it_goes_on(server: dist.TCPStore) -> None:
    code = """
group = join((0, 1))
group.exchange(header(0), sent, 30)
if me == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
answer["lost"] = lost(1.5 if me == 0 else 60, group, 1)
store.set("go on", "1")
"""
    found = processes(code, 2, server.port)
    assert found["ends"] == {"0": 0, "1": 0}
    assert 1.4 < found[0]["lost"] < 6
    assert found[1]["lost"] < 5


def test_a_group_lives_beside_the_hosts_own_and_a_forked_child_does_not_keep_it_open(
    tmp_path: Path, server: dist.TCPStore
) -> None:
    code = f"""
import time, torch
from codistill.exchange.prediction.group import *
store = dist.TCPStore("127.0.0.1", {server.port}, is_master=False, timeout=timedelta(seconds=60))
group = Group(dist.PrefixStore("beside", store), (3, 8), (3, 8)[rank], 1, 60)
sent = torch.full((10,), rank, dtype=torch.uint8)
header = Header(1, 0, (2, 5), "float32", 0, 0, 10)
[theirs] = group.exchange(header, sent, 30).values()
total = torch.ones(1)
dist.all_reduce(total)
answer["found"] = [theirs.tolist(), total.item()]
child = os.fork() if rank == 1 else None
if child == 0:
    time.sleep(60)
    os._exit(0)
dist.barrier()
if rank == 1:
    time.sleep(0.5)
    group.close()
began = time.monotonic()
if rank == 0:
    try:
        group.exchange(header, sent, 30)
    except GroupLost as error:
        answer["error"] = str(error)
answer["seconds"] = time.monotonic() - began
dist.barrier()
if child:
    os.kill(child, 9)
    os.waitpid(child, 0)
"""
    first, second = data_parallel(tmp_path, code, environments=[{"GLOO_SOCKET_IFNAME": "lo"}] * 2)
    assert first["found"] == [[1] * 10, 2]
    assert second["found"] == [[0] * 10, 2]
    assert first["error"] == "peer 8 closed the connection"
    assert first["seconds"] < 10


def test_members_that_are_ever_further_ahead_are_given_up(
    server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_step, "WAIT_SECONDS", 0.05)
    group, other = form(server, (0, 1))
    incidents = Incidents(fatal=False)
    mine = in_step.InStep(group, (0, 1), "float32", 0, Patience(20), incidents)
    own = torch.zeros(4, 5)

    def run_ahead() -> None:
        with contextlib.suppress(GroupLost):
            for _ in range(100):
                with contextlib.suppress(Mismatch):
                    other.exchange(header(payload(1, 80), batch=2**40), payload(1, 80), 20)

    def keep_up() -> None:
        for batch in range(100):
            assert mine.swap(own, (own,), Position(1, batch)) == []
            time.sleep(0.01)

    together([keep_up, run_ahead])
    assert mine.apart
    assert incidents.counts["apart"] == 1
