"""Hosts joined by links of a given speed, on this machine: network namespaces, each behind a pair of veth, on a bridge.

Needs Linux, root, iproute2 and util-linux; `hosts` says so where it fails. Nothing is left behind, whichever way this
process ends: a namespace lasts as long as an idle process in it, which ends when its input does, and what was started
there is killed when the thread that started it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from benchmarks.loopback import Unavailable

INTERFACE = "link0"
QUEUE_SECONDS = 0.1  # longest that a packet waits for its turn; what comes on top is dropped, as by a router
BURST_SECONDS = 0.002  # at full speed after a pause; less is not reached on a busy machine
# A segment as TCP hands it to a network card, which cuts it into packets on its own; here the CPU would, at the cost of
# those who train on it.
LEAST_BURST = 2**16 + 14
MORTAL = ("setpriv", "--pdeathsig", "KILL", "--")
# Who started it may have ended before the signal was asked for, which then never comes.
UNLESS_ORPHANED = ("sh", "-c", 'test "$PPID" = "$0" && exec "$@"')
TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")


@dataclasses.dataclass(frozen=True)
class Host:
    """A namespace with one interface, `INTERFACE`.

    Attributes:
        address: its IPv4 address.
        holder: id of the process that keeps the namespace.
        bridge: of the one that keeps the bridge's.
        port: name of the bridge's end of the link.
    """

    address: str
    holder: int
    bridge: int
    port: str

    def start(
        self, command: Sequence[str], environment: Optional[Mapping[str, str]] = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Run a command there; from a thread that lasts as long as the command.

        Args:
            command: program and arguments.
            environment: in place of our own; gloo is told the interface in any case.
            popen: what else `subprocess.Popen` is to know.
        """
        named = {**(os.environ if environment is None else environment), "GLOO_SOCKET_IFNAME": INTERFACE}
        guarded = [*MORTAL, *UNLESS_ORPHANED, str(os.getpid()), *_inside(self.holder), *command]
        return subprocess.Popen(guarded, env=named, **popen)

    def throttle(self, mbit: Optional[float]) -> None:
        """Give the link another speed, in Mbit/s, each way; None: as fast as this machine copies."""
        for holder, device in ((self.holder, INTERFACE), (self.bridge, self.port)):
            _run(holder, f"tc qdisc replace dev {device} root {_discipline(mbit)}")

    def carried(self) -> tuple[int, int]:
        """Bytes sent and received so far, with the headers of Ethernet, IP and TCP."""
        return carried(self.holder)


@contextlib.contextmanager
def hosts(count: int, mbit: Optional[float] = None) -> Iterator[list[Host]]:
    """So many hosts that reach each other, and nothing else.

    Args:
        count: how many.
        mbit: speed of each host's link, see `Host.throttle`.

    Raises:
        Unavailable: where this cannot be done.
    """
    if os.geteuid() != 0:
        raise Unavailable("only root may make the network namespaces that stand for hosts")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"there is no {missing[0]} command here")
    with contextlib.ExitStack() as ends:
        bridge = ends.enter_context(_namespace())
        _run(bridge, "ip link add bridge type bridge stp_state 0 forward_delay 0")
        _run(bridge, "ip link set bridge addrgenmode none up")
        found = []
        for number in range(1, 1 + count):
            host = Host(f"10.77.0.{number}", ends.enter_context(_namespace()), bridge, f"port{number}")
            _join(host)
            host.throttle(mbit)
            found.append(host)
        yield found


def carried(process: int | str = "self") -> tuple[int, int]:
    """Bytes that the host of a process, this one for instance, has sent and received so far."""
    for line in Path(f"/proc/{process}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            received, sent = (int(numbers.split()[column]) for column in (0, 8))
            return sent, received
    raise Unavailable(f"process {process} is on none of the hosts")


def _join(host: Host) -> None:
    _run(host.holder, f"ip link add {INTERFACE} type veth peer name {host.port} netns {host.bridge}")
    _run(host.bridge, f"ip link set {host.port} addrgenmode none master bridge up")
    _run(host.holder, "ip link set lo up")
    _run(host.holder, f"ip link set {INTERFACE} addrgenmode none up")
    _run(host.holder, f"ip addr add {host.address}/24 dev {INTERFACE}")


def _discipline(mbit: Optional[float]) -> str:
    if mbit is None:
        return "noqueue"
    burst = max(LEAST_BURST, round(mbit * 1e6 / 8 * BURST_SECONDS))
    return f"tbf rate {round(mbit * 1e6)}bit burst {burst} latency {round(1000 * QUEUE_SECONDS)}ms"


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """An idle process in a namespace of its own; it goes when its input ends, as it does when we die."""
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, start_new_session=True, text=True, **pipes) as holder:
        try:
            if not holder.stdout.readline():
                raise Unavailable(holder.stderr.read().strip())
            yield holder.pid
        finally:
            holder.kill()


def _inside(holder: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{holder}/ns/net"]


def _run(holder: int, command: str) -> None:
    done = subprocess.run([*_inside(holder), *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{command}: {done.stderr.strip()}")
