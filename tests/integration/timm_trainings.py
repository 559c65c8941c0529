"""Real timm trainings on scikit-learn's digits, that can be waited for, killed and looked into.

Their processes are forked from one that has imported torch and timm; each has its output in files. The script is our
stand-in, and with `TIMM_TRAIN_SCRIPT` a real train.py of timm's as well. A test module takes the fixture by
`runs = timm_trainings.runs`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

from recipes.embedded.vision.data import write_digits
from tests.integration.run_timm import Worker, work

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = str(ROOT / "recipes" / "embedded" / "vision" / "train.py")
UPSTREAM = "TIMM_TRAIN_SCRIPT"
SECONDS = 240.0  # longest wait for a training of a few updates, on a machine that does other things too
UPDATES = 14  # in an epoch of one worker
MODEL = ("--model", "test_resnet", "--num-classes", "10", "--input-size", "3", "16", "16", "--drop", "0.1")
TRAINING = (
    *("--device", "cpu", "--workers", "0", "-b", "96", "--epochs", "2", "--log-interval", "5"),
    *("--opt", "sgd", "--lr", "0.05", "--weight-decay", "0.001", "--warmup-epochs", "0"),
)
SYNC = ("--codistill-sync",)  # with it every interval brings a new snapshot, however few updates there are


@pytest.fixture(params=["stand-in", pytest.param("upstream", marks=pytest.mark.upstream)])
def script(request):
    if request.param == "stand-in":
        return STAND_IN
    if UPSTREAM not in os.environ:
        pytest.skip(f"set {UPSTREAM}")
    return os.environ[UPSTREAM]


@pytest.fixture
def runs(tmp_path, tmp_path_factory, script):
    with Trainings(tmp_path, digits(tmp_path_factory), script) as started:
        yield started


def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, written once in a test session, whatever the number of its processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by the processes of this session
    with FileLock(folder / "digits.lock"):
        return write_digits(folder / "digits")


class Training:
    """One training.

    Attributes:
        save_dir: where train.py writes checkpoints.
        processes: its workers, in the order of their ranks.
    """

    def __init__(self, save_dir: Path, workers: list[dict[str, Any]]) -> None:
        """Start a process for each of `workers`; output is appended."""
        save_dir.parent.mkdir(parents=True, exist_ok=True)
        self.save_dir = save_dir
        self.processes: list[Any] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.integration.run_timm"])
        for rank, told in enumerate(workers):
            files = {kind: str(self._file(kind, rank)) for kind in ("out", "err", "record")}
            process = context.Process(target=work, args=(Worker(**files, **told),))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = SECONDS) -> Training:
        """Wait until every worker has ended well; otherwise show the ends of the logs."""
        codes = self._end(seconds)
        assert all(code == 0 for code in codes), f"workers ended with {codes}\n{self._tails()}"
        return self

    def fails(self, seconds: float = SECONDS) -> str:
        """Wait for a training that must fail; gives what worker 0 wrote to its error stream."""
        codes = self._end(seconds)
        assert codes[0] not in (0, None), f"worker 0 ended with {codes[0]}\n{self._tails()}"
        return self.errors()

    def reach(self, batches: int, seconds: float = SECONDS) -> Training:
        """Wait until worker 0 has computed so many batches."""
        end = time.monotonic() + seconds
        while len(self.records()) < batches:
            assert self.processes[0].exitcode is None, f"it ended before batch {batches}\n{self._tails()}"
            assert time.monotonic() < end, f"it did not come to batch {batches} in {seconds} s\n{self._tails()}"
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        """SIGKILL to every worker and its children; returns when they are gone."""
        for process in self.processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    @property
    def running(self) -> bool:
        """Whether a worker still is."""
        return any(process.exitcode is None for process in self.processes)

    def records(self, rank: int = 0) -> list[dict[str, Any]]:
        """The exact numbers of every batch so far; a restart appends."""
        return _json_lines(self._file("record", rank))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return _json_lines(self.save_dir / "metrics.jsonl")

    def summary(self) -> list[dict[str, str]]:
        """timm's summary.csv."""
        with open(self.save_dir / "summary.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def errors(self, rank: int = 0) -> str:
        """What worker `rank` wrote to its error stream: timm's log."""
        return self._file("err", rank).read_text(encoding="utf-8")

    def checkpoint(self, name: str = "last.pth.tar") -> dict[str, Any]:
        """A checkpoint, read without running anything in it."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(self.save_dir / name, map_location="cpu", weights_only=True)

    def _file(self, kind: str, rank: int) -> Path:
        return self.save_dir.with_name(f"{self.save_dir.name}.{kind}-{rank}")

    def _end(self, seconds: float) -> list[int | None]:
        """Exit codes when all have ended, one has failed, or time is up; none is left running."""
        end = time.monotonic() + seconds
        while True:
            codes = [process.exitcode for process in self.processes]
            if any(codes) or None not in codes or time.monotonic() > end:
                self.processes[0].join(5.0)  # let it say what it has to say
                codes = [process.exitcode for process in self.processes]
                self.kill()
                return codes
            time.sleep(0.02)

    def _tails(self) -> str:
        files = [self._file(kind, rank) for rank in range(len(self.processes)) for kind in ("out", "err")]
        return "\n".join(
            f"--- {file.name}\n{file.read_text(encoding='utf-8')[-3000:]}" for file in files if file.exists()
        )


class Trainings:
    """Starts trainings below one folder, and ends whatever still runs when closed."""

    def __init__(self, folder: Path, data: Path, script: str) -> None:
        """All trainings of a test share `folder`: `exchange` is the peers' store, `out` holds the save dirs."""
        self.folder, self.data, self.script = folder, data, script
        self.exchange = folder / "exchange"
        self._started: list[Training] = []
        self._stores: list[dist.TCPStore] = []
        # Apart from the machine's own, so that killed processes leave nothing there.
        self._temporary = tempfile.TemporaryDirectory(prefix="cd-", ignore_cleanup_errors=True)

    def __enter__(self) -> Trainings:
        return self

    def __exit__(self, *error: object) -> None:
        for training in self._started:
            training.kill()
        self._stores.clear()
        self._temporary.cleanup()

    def stock(self, name: str, *flags: str | Path, **how: Any) -> Training:
        """train.py as it is; `how` is what `start` takes."""
        return self.start(name, *flags, codistilled=False, **how)

    def peer(self, number: int, *flags: str | Path, run_id: str = "run", peers: int = 2, **how: Any) -> Training:
        """Peer `number`; `how` is what `start` takes."""
        return self.start(
            f"{run_id}-{number}",
            *("--codistill", "--codistill-dir", self.exchange, "--codistill-run-id", run_id),
            *("--codistill-peer", str(number), "--codistill-peers", str(peers)),
            *("--codistill-interval", "5", "--codistill-timeout", "120"),
            *flags,
            codistilled=True,
            **how,
        )

    def start(
        self,
        name: str,
        *flags: str | Path,
        codistilled: bool,
        workers: int = 1,
        seed: int = 1,
        sampler_seed: int = 0,
        pause: float = 0.0,
        sync_batchnorm: bool = False,
    ) -> Training:
        """Start train.py with `flags`, which may repeat and thereby override what is set here.

        Args:
            name: of the save dir.
            flags: for train.py.
            codistilled: through `timm-codistill`.
            workers: data-parallel CPU workers.
            seed: `--seed`.
            sampler_seed: of a distributed sampler, where train.py names none.
            pause: seconds that every batch takes longer.
            sync_batchnorm: make torch's SyncBatchNorm, for `--sync-bn`, work on the CPU.
        """
        told = {
            "script": self.script,
            "flags": [*self.flags(name, seed), *map(str, flags)],
            "codistilled": codistilled,
            "sampler_seed": sampler_seed,
            "pause": pause,
            "sync_batchnorm": sync_batchnorm,
        }
        env = {"TMPDIR": self._temporary.name, "GLOO_SOCKET_IFNAME": "lo"}
        envs = [{**env, **place} for place in self._places(workers)]
        training = Training(self.folder / "out" / name, [{**told, "env": one} for one in envs])
        self._started.append(training)
        return training

    def flags(self, name: str, seed: int = 1) -> list[str]:
        """What every training is told."""
        where = ["--data-dir", str(self.data), "--output", str(self.folder / "out"), "--experiment", name]
        return [*where, *MODEL, *TRAINING, "--seed", str(seed)]

    def _places(self, workers: int) -> list[dict[str, str]]:
        """Environments that make `workers` processes meet as torchrun's do, in a store that this process holds."""
        if workers == 1:
            return [{}]
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS)
        )
        self._stores.append(store)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers))
        return [{**shared, "WORLD_SIZE": str(workers), **rank} for rank in ranks]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last may just be being written."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
