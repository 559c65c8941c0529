"""How much memory does codistilling take?

The peak of a process that trains a Transformer, from its start to its last update, less that of a process that trains
the same plainly; beside it the sum of what should be there. The peer is a third process, which publishes new weights
all the while, so that snapshots are published, fetched, verified and taken up during the updates that are measured. On
the CPU peaks are resident memory, mapped files included, which the system takes back when it needs the room; on CUDA
the device's is measured too, as what torch allocates there. Goal: nothing beyond the sum but a tenth of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.record import Row
from benchmarks.workloads import Training, Translation
from codistill import CodistillConfig, Codistiller, fingerprint
from codistill.exchange.snapshot import HostBuffer

TOLERANCE = 0.15
WORKLOAD = Translation(classes=32000, width=512, sentences=12)
INTERVAL = 3
UPDATES = 9  # a whole number of intervals
SNAPSHOTS = 2  # to be taken up, at least, during training
MIB = 2**20


def measure(device: str) -> Iterator[Row]:
    """For host and device the extra at the peak, in shares of the sum of the items."""
    plain = json.loads(_child("plain", device))
    with tempfile.TemporaryDirectory() as folder:
        other = subprocess.Popen([*_command("other", device), folder], stdin=subprocess.PIPE)
        try:
            codistilled = json.loads(_child("codistilled", device, folder))
        finally:
            other.kill()
            other.wait()
    for place in plain:
        found = items(place, device)
        extra, total = codistilled[place] - plain[place], sum(found.values())
        details = {"extra MiB": extra, "itemised MiB": total, **found, "plain peak MiB": plain[place]}
        rounded = {name: round(value, 1) for name, value in details.items()}
        yield Row(f"{place} memory, 1 peer", extra / total, extra / total, extra / total, goal=1.1, details=rounded)


def items(place: str, device: str) -> Mapping[str, float]:
    """MiB of all that codistilling with one peer keeps in `place`."""
    state = WORKLOAD.build(0).state_dict()
    weights = sum({t.data_ptr(): t.numel() * t.element_size() for t in state.values()}.values()) / MIB
    logits = 4 * torch.Size(WORKLOAD.logits).numel() / MIB
    snapshot = HostBuffer(state, "float32").nbytes / MIB
    on_device = {"peer weights MiB": weights, "peer logits MiB": logits}
    on_host = {"host buffer MiB": snapshot, "mapped snapshot MiB": snapshot}
    if place == "device":
        return on_device
    return on_host if device == "cuda" else on_device | on_host


def _child(*arguments: str) -> str:
    done = subprocess.run(_command(*arguments), check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", *arguments]


def codistiller_of(training: Training, folder: str, peer: int, device: str) -> Codistiller:
    return Codistiller(
        CodistillConfig(dir=f"{folder}/exchange", peer=peer, interval=INTERVAL),
        model=training.model,
        build_peer=lambda: WORKLOAD.build(seed=0).to(device),
        fingerprint=fingerprint(WORKLOAD.classes),
        save_dir=Path(folder) / str(peer),
    )


def plain(device: str) -> None:
    training = Training(WORKLOAD, 1, device)
    for _ in range(UPDATES):
        training.update()


def codistilled(device: str, folder: str) -> None:
    """Train until enough snapshots were taken up, and at least as long as the plain training."""
    training, update, taken = Training(WORKLOAD, 1, device), 0, set()
    codistiller = codistiller_of(training, folder, 0, device)
    while update < UPDATES or len(taken) < SNAPSHOTS:
        codistiller.begin_update(update, epoch=1)
        training.update(codistiller)
        used = codistiller.state_dict()["in_use"].values()
        taken |= {one["sha256"] for one in used}
        update += 1
    codistiller.close()


def other(device: str, folder: str) -> None:
    """The peer, without its training: its weights are new at every boundary."""
    training, update = Training(WORKLOAD, 2, device), 0
    codistiller = codistiller_of(training, folder, 1, device)
    while True:
        codistiller.begin_update(update, epoch=1)
        with torch.no_grad():
            next(training.model.parameters()).mul_(0.999)
        update += 1
        time.sleep(2.0 / INTERVAL)


def peaks(device: str) -> dict[str, float]:
    """MiB, of this process since it began."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    host = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    return {"host": host} | ({"device": torch.cuda.max_memory_allocated() / MIB} if device == "cuda" else {})


if __name__ == "__main__":
    {"plain": plain, "codistilled": codistilled, "other": other}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(peaks(sys.argv[2])))
