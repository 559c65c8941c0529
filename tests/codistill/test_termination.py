"""SIGTERM in real processes: who handles it, in which order, and how the process ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOOP = """
import os, signal, sys, time
from codistill import termination
from codistill.termination import Termination

def say(text):
    os.write(1, f"{{text}}\\n".encode())

{before}
listener = Termination()
listener.install()
say("ready")
while True:
    {busy}
    if listener.requested:
        say("boundary")
        listener.settle()
        say("goes on")
        {after}
"""
HANDLER = "signal.signal(signal.SIGTERM, lambda number, frame: say('theirs'))"


@pytest.fixture
def start():
    started = []

    def start(before="", busy="time.sleep(0.01)", after="pass"):
        code = LOOP.format(before=before, busy=busy, after=after)
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def rest(process):
    output, errors = process.communicate(timeout=60)
    assert errors == ""
    return output.split("\n")[:-1]


def test_without_another_handler_the_process_ends_by_sigterm_after_the_boundary(start):
    process = start()
    process.terminate()
    assert rest(process) == ["boundary"]
    assert process.returncode == -signal.SIGTERM


def test_the_handler_that_was_there_is_called_at_once_and_the_training_goes_on(start):
    process = start(before=HANDLER, after="sys.exit(7)")
    process.terminate()
    assert rest(process) == ["theirs", "boundary", "goes on"]
    assert process.returncode == 7


def test_a_handler_that_ends_the_process_ends_it(start):
    process = start(before="signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(9))")
    process.terminate()
    assert rest(process) == []
    assert process.returncode == 9


def test_an_ignored_sigterm_still_brings_a_boundary_and_the_training_goes_on(start):
    process = start(before="signal.signal(signal.SIGTERM, signal.SIG_IGN)", after="sys.exit(7)")
    process.terminate()
    assert rest(process) == ["boundary", "goes on"]
    assert process.returncode == 7


def test_an_update_that_does_not_end_is_not_waited_for(start):
    process = start(before="termination.GRACE_SECONDS = 0.3", busy="time.sleep(600)")
    process.terminate()
    assert rest(process) == []
    assert process.returncode == 128 + signal.SIGTERM


def test_a_second_sigterm_does_not_end_the_update_at_hand(start):
    process = start(busy="time.sleep(0.5)")
    process.terminate()
    time.sleep(0.1)  # else the two become one
    process.terminate()
    assert rest(process) == ["boundary"]
    assert process.returncode == -signal.SIGTERM


def test_a_forked_child_ends_by_sigterm_at_once(start):
    process = start(before="pid = None", after="pass", busy=FORK)
    child = int(process.stdout.readline())
    os.kill(child, signal.SIGTERM)
    assert process.stdout.readline() == f"child ended with {signal.SIGTERM}\n"


FORK = """if pid is None:
        pid = os.fork()
        if pid == 0:
            say(os.getpid())  # not before: Python forgets a signal that comes while it forks
            time.sleep(60)
        say(f"child ended with {os.waitpid(pid, 0)[1]}")
    time.sleep(0.01)"""


def terminated_after_its_first_turn(process):
    """The line that the handler says to a process that says "turn" over and over."""
    assert process.stdout.readline() == "turn\n"
    process.terminate()
    while (line := process.stdout.readline()) == "turn\n":
        pass
    return line


def test_removing_it_puts_back_what_was_there(start):
    process = start(before=HANDLER, busy="listener.remove(); say('turn'); time.sleep(0.01)", after="say('not removed')")
    assert terminated_after_its_first_turn(process) == "theirs\n"
    assert [process.stdout.readline() for _ in range(3)] == ["turn\n"] * 3


def test_a_handler_installed_later_is_left_alone(start):
    process = start(busy=f"{HANDLER}; listener.remove(); say('turn'); time.sleep(0.01)")
    assert terminated_after_its_first_turn(process) == "theirs\n"


def test_after_removal_a_handler_installed_later_that_calls_ours_keeps_the_last_word(start):
    chained = (
        "ours = signal.getsignal(signal.SIGTERM); "
        "signal.signal(signal.SIGTERM, lambda number, frame: (ours(number, frame), say('theirs'))); "
        "listener.remove(); say('turn'); time.sleep(60)"
    )
    process = start(before="", busy=chained)
    assert process.stdout.readline() == "turn\n"
    process.terminate()
    assert process.stdout.readline() == "theirs\n"
    assert process.poll() is None


def test_outside_the_main_thread_nothing_is_changed():
    code = """
import signal, threading
from codistill.termination import Termination
listener = Termination()
thread = threading.Thread(target=listener.install)
thread.start(); thread.join()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
listener.remove()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
