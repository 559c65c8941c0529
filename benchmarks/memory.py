"""How much memory does codistilling take? (goal: plain + a module a peer + one host buffer + 200 MB, resident)"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.transformer import Size, Training, exchanging

SIZE = Size(classes=16000, width=512, layers=4, sentences=4)
UPDATES = 10


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def child(kind: str) -> None:
    """Train for a while and print the peak; the second peer, which lives in this process too, counts as plain."""
    if kind == "plain":
        training, _bystander = Training(SIZE, seed=1), Training(SIZE, seed=2)
        for _ in range(UPDATES):
            training.update()
    else:
        with exchanging(SIZE) as ((training, codistiller), _):
            for _ in range(UPDATES):
                training.update(codistiller)
            print(peak_megabytes())
            return
    print(peak_megabytes())


def measure() -> Iterator[str]:
    peaks = {}
    for kind in ("plain", "codistilled"):
        command = [sys.executable, "-c", f"from benchmarks.memory import child; child({kind!r})"]
        peaks[kind] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    model = sum(t.numel() * t.element_size() for t in Training(SIZE, seed=1).model.parameters()) / 2**20
    # Both peers live in the measured process: two modules and two host buffers are what it may add.
    allowed = 2 * (model + model)
    beyond = peaks["codistilled"] - peaks["plain"] - allowed
    yield (
        f"{model:.0f} MiB model: peak {peaks['plain']:.0f} MiB plain, {peaks['codistilled']:.0f} MiB codistilled "
        f"with both peers in one process; beyond their modules and host buffers ({allowed:.0f} MiB): {beyond:.0f} MiB"
    )
