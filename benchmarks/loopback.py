"""The loopback interface of a network namespace of one's own: what a few processes send each other, and nothing else.

Needs Linux and `unshare` (util-linux), as root or where users may have namespaces; `alone` says so where it fails.
"""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 1800.0  # for all that one call runs
_SET_FLAGS, _UP = 0x8914, 0x1


class Unavailable(RuntimeError):
    """No namespace can be had here; `str()` says why."""


def alone(module: str, *arguments: str) -> Any:
    """Run `python -m module arguments` in a namespace of its own; what its last line says, which is JSON.

    Raises:
        Unavailable: where this cannot be done.
        RuntimeError: it failed, or took longer than `LONGEST_SECONDS`.
    """
    if shutil.which("unshare") is None:
        raise Unavailable("there is no unshare command here")
    users = [] if os.geteuid() == 0 else ["--map-root-user"]
    probe = subprocess.run(["unshare", *users, "--net", "true"], capture_output=True, text=True)
    if probe.returncode:
        raise Unavailable(probe.stderr.strip())
    command = ["unshare", *users, "--net", sys.executable, "-W", "ignore", "-m", module, *arguments]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} took longer than {LONGEST_SECONDS:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def switch_on() -> None:
    """Bring up `lo`, which is down in a new namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh22x", b"lo", _UP))


def carried() -> int:
    """Bytes that `lo` has carried so far, with the headers of TCP and IP."""
    lines: Sequence[str] = Path("/proc/self/net/dev").read_text().splitlines()
    numbers = next(line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return int(numbers[8])
