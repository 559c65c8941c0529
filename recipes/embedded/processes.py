"""Child processes side by side, with a time limit and a clean end.

`run_all` returns when every child ended well. If one fails, the limit passes, or the caller is interrupted (Ctrl-C or
SIGTERM), all of them are ended first (SIGTERM to each process group, SIGKILL a moment later): no child is left behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 5.0


class ProcessFailed(RuntimeError):
    """A child failed or took too long; the message is one line that names its log."""


@dataclass(frozen=True)
class Command:
    """What to run: `argv` with `env` added to ours, stdout and stderr going to the file `log`."""

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)


def run_all(
    commands: Sequence[Command], *, limit: float, watch: Callable[[], None] | None = None, every: float = 1.0
) -> float:
    """Run all commands at the same time and wait for them.

    Args:
        commands: what to run.
        limit: seconds after which the whole is given up.
        watch: called about every `every` seconds while they run.
        every: seconds between two looks at `watch`.

    Returns:
        Wall time in seconds.

    Raises:
        ProcessFailed: a child ended with a non-zero status, or the limit passed.
    """
    started = time.monotonic()
    children: list[subprocess.Popen[bytes]] = []
    done = False
    with _sigterm_interrupts():
        try:
            for command in commands:
                children.append(_start(command))
            _wait(commands, children, started + limit, watch, every)
            done = True
        finally:
            if not done:
                _stop(children)
    return time.monotonic() - started


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def loopback_interface() -> str:
    """Name of the loopback network interface (`lo`, `lo0`)."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return names[0] if names else "lo"


def _start(command: Command) -> subprocess.Popen[bytes]:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with open(command.log, "wb") as log:
        return subprocess.Popen(
            list(command.argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **command.env},
            start_new_session=True,
            close_fds=False,  # only what was made inheritable on purpose is passed on: the lock of `steps.exclusive`
        )


def _wait(
    commands: Sequence[Command],
    children: Sequence[subprocess.Popen[bytes]],
    deadline: float,
    watch: Callable[[], None] | None,
    every: float,
) -> None:
    look = time.monotonic() + every
    while True:
        states = [child.poll() for child in children]
        for command, state in zip(commands, states, strict=True):
            if state:
                raise ProcessFailed(f"{command.name} ended with status {state}: {_last_line(command.log)}")
        if all(state == 0 for state in states):
            return
        if time.monotonic() > deadline:
            names = ", ".join(command.name for command, state in zip(commands, states, strict=True) if state is None)
            raise ProcessFailed(f"{names}: not done in the time allowed, see {commands[0].log.parent}")
        if watch is not None and time.monotonic() >= look:
            watch()
            look = time.monotonic() + every
        time.sleep(min(0.1, every))


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
    finally:  # at a second Ctrl-C at once
        for child in children:
            _signal_group(child, signal.SIGKILL)  # also what a leader that ended early left behind in its group
        for child in children:
            child.wait()


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'no output'} (log: {log})"


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """While inside, SIGTERM is handled like Ctrl-C, so that the children are ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
