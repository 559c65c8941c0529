"""Hosts behind links of a given speed, with real transfers between them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest

from benchmarks.links import INTERFACE, Host, Unavailable, carried, hosts
from tests.processes import gone, gone_soon

MBIT = 50.0
SIZE = 4_000_000
RECEIVE = """
import socket, time
server = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
connection, _ = server.accept()
began, got = time.perf_counter(), 0
while data := connection.recv(1 << 20):
    got += len(data)
print(got, time.perf_counter() - began, flush=True)
"""
SEND = f"import socket, sys; socket.create_connection((sys.argv[1], 5000)).sendall(bytes({SIZE}))"
HOLD = """
import os, subprocess, time
from benchmarks.links import hosts
with hosts(2) as found:
    inside = found[0].start(["sleep", "300"])
    print(found[0].holder, found[1].holder, found[0].bridge, inside.pid, flush=True)
    time.sleep(300)
"""
START = """
import ast, sys, time
from benchmarks.links import Host
host = Host(**ast.literal_eval(sys.argv[1]))
print(host.start(["sleep", "300"]).pid, flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module", autouse=True)
def available() -> None:
    try:
        with hosts(1, MBIT):
            pass
    except Unavailable as reason:
        pytest.skip(str(reason))


def started(host: Host, code: str) -> subprocess.Popen[str]:
    return host.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_link_counts_what_it_carries_and_is_no_faster_than_it_may_be():
    with hosts(2, MBIT) as (one, other), started(other, RECEIVE) as receiver:
        assert receiver.stdout.readline() == "ready\n"
        sent_before, received_before = one.carried()[0], other.carried()[1]
        one.start([sys.executable, "-c", SEND, other.address]).wait(60)
        got, seconds = receiver.communicate(timeout=60)[0].split()
        sent, received = one.carried()[0] - sent_before, other.carried()[1] - received_before
    assert int(got) == SIZE
    assert SIZE < sent < 1.2 * SIZE
    assert SIZE < received < 1.2 * SIZE
    burst = MBIT * 1e6 / 8 * 0.1  # much more than goes through at once
    assert float(seconds) > (SIZE - burst) / (MBIT * 1e6 / 8)


def test_hosts_reach_nothing_but_each_other():
    listing = "import socket; print(*(name for _, name in socket.if_nameindex()))"
    with hosts(1) as [host], started(host, listing) as process:
        assert process.communicate(timeout=60)[0].split() == ["lo", INTERFACE]


def test_who_is_on_none_of_the_hosts_is_told_so():
    with pytest.raises(Unavailable, match="on none of the hosts"):
        carried()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_is_ended_from_outside(sign):
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        processes = [int(word) for word in run.stdout.readline().split()]
        assert [gone(process) for process in processes] == 4 * [False]
        run.send_signal(sign)
    assert gone_soon(processes) == 4 * [True]


def test_what_had_only_just_started_when_its_starter_was_killed_ends_too(tmp_path):
    slow = tmp_path / "setpriv"
    slow.write_text(f'#!/bin/sh\nsleep 2\nexec {shutil.which("setpriv")} "$@"\n')
    slow.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with hosts(1) as [host]:
        command = [sys.executable, "-c", START, repr(dataclasses.asdict(host))]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as starter:
            process = int(starter.stdout.readline())
            assert not gone(process)
            starter.kill()
        assert gone_soon([process]) == [True]
