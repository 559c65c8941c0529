"""What the tests of several peers share: waiting for them, looking at what they left on the machine and the store."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from codistill.exchange.manifest import Latest
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
from tests.integration.fairseq_trainings import SECONDS, USER_DIR, Training, Trainings

FOREVER = 10**6  # updates of a training that a test ends when it has seen enough


def until(condition: Callable[[], Any], *watched: Training, seconds: float = SECONDS) -> Any:
    """What `condition` gives once it is true.

    Raises:
        AssertionError: it took too long, or one of the `watched` trainings ended before.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        for training in watched:
            assert training.running, f"{training.save_dir.name} ended too early\n{training.errors()[-3000:]}"
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.05)
    return found


def used(training: Training) -> int:
    """The number of peers in use at the last boundary."""
    lines = training.metrics()
    return int(lines[-1]["peers"]) if lines else 0


def learns_on(training: Any, times: int = 1) -> Callable[[], bool]:
    """Whether from now on it takes up so many snapshots more: a condition for `until`."""
    before = len(_taken_up(training))
    return lambda: len(_taken_up(training)) >= before + times


def ring_closes_over_a_killed_and_a_stopped_peer(peers: Sequence[Any]) -> list[Any]:
    """Four peers on a ring learn; one is killed, then one stopped, and the last learns on; gives those that live."""
    for peer in peers:
        until(learns_on(peer), *peers)
    peers[2].kill()
    until(learns_on(peers[3], times=3), peers[3])
    stopped = peers[1].processes[0].pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        until(learns_on(peers[3], times=3), peers[3])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    until(learns_on(peers[1]), peers[1])
    alive = [peers[0], peers[1], peers[3]]
    for peer in alive:
        last = peer.metrics()[-1]
        assert (last["peers"], last["incidents"]) == (1, 0), peer.errors()[-3000:]
    return alive


def _taken_up(training: Any) -> set[int]:
    """The boundaries at which something new was in use, by its metrics."""
    return {line["received"] for line in training.metrics() if line["peers"] and line["staleness"] == 0}


def penalised(training: Training, rank: int = 0, since: int = 0) -> list[int]:
    """The updates, from `since` on, in which something was added to the host's loss."""
    return [update for update, added in training.penalties(rank).items() if added and update >= since]


def refused(training: Training) -> str:
    """The line with which a training that could not join a run ended, with exit code 1 and without a traceback."""
    errors = training.fails()
    assert training.processes[0].returncode == 1, errors
    assert "Traceback" not in errors
    return errors.rstrip("\n").splitlines()[-1]


def latest(trainings: Trainings, peer: int, run_id: str = "run") -> Latest | None:
    """The peer's newest word on the store."""
    return RunStore(Objects(str(trainings.exchange)), run_id).latest(peer)


def in_use(training: Training) -> dict[str, dict[str, Any]]:
    """What the last checkpoint says of the peers' snapshots in use."""
    return training.checkpoint()["extra_state"]["TranslationTask"]["codistill"]["in_use"]


def temporary(folder: Path, name: str) -> dict[str, str]:
    """An environment with a temporary folder of one's own."""
    (folder / name).mkdir(exist_ok=True)
    return {"TMPDIR": str(folder / name)}


def left_behind(folder: Path) -> list[Path]:
    """What a training left of the exchange in its temporary folder."""
    return [path for path in folder.rglob("*") if "codistill" in path.name]


def elsewhere(trainings: Trainings, name: str, peer: int, *flags: str, seed: int = 50, **how: Any) -> Training:
    """Peer `peer` of run `run` with a save dir of its own, as if started by somebody else."""
    return trainings.start(
        name,
        *("--user-dir", USER_DIR, "--criterion", "codistill", "--codistill-dir", trainings.exchange),
        *("--codistill-run-id", "run", "--codistill-peer", str(peer), "--codistill-interval", "5"),
        *flags,
        seed=seed,
        **how,
    )


def same_parameters(left: Training, right: Training) -> bool:
    """Whether the last checkpoints hold the same bits, and were made at the same update."""
    ours, theirs = left.checkpoint(), right.checkpoint()
    updates = [c["optimizer_history"][-1]["num_updates"] for c in (ours, theirs)]
    assert updates[0] == updates[1]
    assert ours["model"].keys() == theirs["model"].keys()
    return all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


def other_dictionary(data: Path, folder: Path) -> Path:
    """A copy of a data folder in whose dictionaries two symbols have changed places."""
    folder.mkdir()
    for source in data.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    for side in ("src", "tgt"):
        lines = (folder / f"dict.{side}.txt").read_text().splitlines()
        lines[3], lines[4] = lines[4], lines[3]
        (folder / f"dict.{side}.txt").write_text("\n".join(lines) + "\n")
    return folder
