"""Real fairseq processes: a toy corpus, and trainings that can be waited for, killed and looked into.

A `Training` is one peer (or one plain training) of one or several CPU workers, each in a process group of its own, with
its output in files. Whoever makes `Trainings` closes them, which ends every process that still runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
USER_DIR = str(ROOT / "fairseq_codistill")
RUNNER = Path(__file__).with_name("run_fairseq.py")
SECONDS = 240.0  # longest wait for a training of a few updates, on a machine that does other things too

TRANSFORMER = (
    *("--arch", "transformer", "--share-all-embeddings", "--dropout", "0.1", "--attention-dropout", "0.1"),
    *("--encoder-layers", "1", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"),
    *("--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
)
TRANSFORMER_LM = (
    *(
        "--arch",
        "transformer_lm",
        "--dropout",
        "0.1",
        "--attention-dropout",
        "0.1",
        "--share-decoder-input-output-embed",
    ),
    *("--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
    *("--decoder-attention-heads", "2"),
)
TRANSLATION = ("--task", "translation", "--source-lang", "src", "--target-lang", "tgt")
LANGUAGE_MODELING = ("--task", "language_modeling", "--tokens-per-sample", "16")
TRAINING = (
    *("--num-workers", "0", "--optimizer", "adam", "--lr", "0.003", "--max-tokens", "300"),
    *("--log-format", "json", "--log-interval", "1", "--no-epoch-checkpoints", "--label-smoothing", "0.1"),
    # Without it fairseq composes other batches when it resumes after the first epoch: no resume would give equal bits.
    *("--update-epoch-batch-itr", "True"),
)


@dataclass(frozen=True)
class Toy:
    """A binarised corpus whose target sentences are the reversed source sentences.

    Attributes:
        translation: data folder for the task translation.
        language_modeling: data folder for the task language_modeling: the source side.
    """

    translation: Path
    language_modeling: Path

    @classmethod
    def at(cls, folder: Path) -> Toy:
        return cls(folder / "translation", folder / "language_modeling")

    @classmethod
    def build(cls, folder: Path) -> Toy:
        """Write the raw text and binarise it."""
        toy, raw = cls.at(folder), folder / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        _write_text(raw)
        run(
            *("preprocess", "-s", "src", "-t", "tgt", "--joined-dictionary", "--destdir", toy.translation),
            *("--trainpref", raw / "train", "--validpref", raw / "valid", "--testpref", raw / "test"),
        )
        toy.language_modeling.mkdir(exist_ok=True)
        shutil.copy(toy.translation / "dict.src.txt", toy.language_modeling / "dict.txt")
        for split in ("train", "valid", "test"):
            for kind in ("bin", "idx"):
                source = toy.translation / f"{split}.src-tgt.src.{kind}"
                shutil.copy(source, toy.language_modeling / f"{split}.{kind}")
        return toy


def _write_text(folder: Path) -> None:
    draw = random.Random(0)
    for split, count in (("train", 400), ("valid", 40), ("test", 20)):
        lines = [[f"w{draw.randrange(30)}" for _ in range(draw.randrange(3, 9))] for _ in range(count)]
        for side, step in (("src", 1), ("tgt", -1)):
            text = "".join(" ".join(words[::step]) + "\n" for words in lines)
            (folder / f"{split}.{side}").write_text(text, encoding="utf-8")


def run(command: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Run one of fairseq's other commands to its end; gives what it printed.

    Raises:
        AssertionError: it failed; says with what.
    """
    done = subprocess.run(
        [sys.executable, str(RUNNER), command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=_environment(env or {}),
        check=False,
    )
    assert done.returncode == 0, f"fairseq-{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **extra}


class Training:
    """One fairseq training.

    Attributes:
        save_dir: fairseq's `--save-dir`.
        processes: its workers, in the order of their ranks.
    """

    def __init__(self, save_dir: Path, commands: Sequence[Sequence[str]], env: Mapping[str, str], pause: float) -> None:
        """Start a process for each of `commands`; what is already in `save_dir` is kept, output is appended."""
        self.save_dir = save_dir
        self.processes: list[subprocess.Popen[bytes]] = []
        save_dir.mkdir(parents=True, exist_ok=True)
        for rank, command in enumerate(commands):
            with open(self._file("out", rank), "ab") as out, open(self._file("err", rank), "ab") as err:
                recorded = {"FAIRSEQ_RECORD": str(self._file("record", rank)), "FAIRSEQ_PAUSE": str(pause)}
                recorded["FAIRSEQ_STOP"] = str(self._file("stop", 0))
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(RUNNER), *command],
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        env=_environment({**recorded, **env}),
                        start_new_session=True,
                    )
                )

    def wait(self, seconds: float = SECONDS) -> Training:
        """Wait until every worker has ended well.

        Raises:
            AssertionError: one failed, or it took longer than `seconds`; shows the ends of the logs.
        """
        codes = self._end(seconds)
        assert all(code == 0 for code in codes), f"workers ended with {codes}\n{self._tails()}"
        return self

    def end(self, after: int = 50) -> Training:
        """Have training end normally `after` updates from now, on all workers; returns when it has."""
        unfinished = self._file("unfinished", 0)
        unfinished.write_text(str(self.records()[-1]["update"] + after), encoding="utf-8")
        unfinished.replace(self._file("stop", 0))  # whole at once: they must not read half of it
        return self.wait()

    def fails(self, seconds: float = SECONDS) -> str:
        """Wait for a training that must fail; gives what worker 0 wrote to its error stream."""
        codes = self._end(seconds)
        assert codes[0] not in (0, None), f"worker 0 ended with {codes[0]}\n{self._tails()}"
        return self.errors()

    def reach(self, update: int, seconds: float = SECONDS) -> Training:
        """Wait until worker 0 has computed a batch of update `update` (updates done before it)."""
        end = time.monotonic() + seconds
        while not any(entry["update"] >= update for entry in self.records()):
            assert self.processes[0].poll() is None, f"it ended before update {update}\n{self._tails()}"
            assert time.monotonic() < end, f"it did not come to update {update} in {seconds} s\n{self._tails()}"
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        """SIGKILL to every worker and its children; returns when they are gone."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def records(self, rank: int = 0, step: str = "train") -> list[dict[str, Any]]:
        """The exact numbers of every batch so far (see run_fairseq.py); a restart appends."""
        return [entry for entry in _json_lines(self._file("record", rank)) if entry["step"] == step]

    def penalties(self, rank: int = 0) -> dict[int, float]:
        """What was added to the host's loss, by updates done; summed over an update's batches."""
        added: dict[int, float] = {}
        for entry in self.records(rank):
            added[entry["update"]] = added.get(entry["update"], 0.0) + entry["loss"] - entry["host_loss"]
        return added

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return _json_lines(self.save_dir / "metrics.jsonl")

    def logged(self, tag: str = "train_inner") -> list[dict[str, Any]]:
        """fairseq's own JSON log lines of `tag` (train_inner, train, valid), as strings of its choice."""
        found = []
        for line in self.output().splitlines():
            _, mark, body = line.partition(f"| INFO | {tag} | ")
            if mark and body.startswith("{"):
                found.append(json.loads(body))
        return found

    def output(self, rank: int = 0) -> str:
        """What worker `rank` wrote to its standard output: fairseq's log."""
        return self._file("out", rank).read_text(encoding="utf-8")

    def errors(self, rank: int = 0) -> str:
        """What worker `rank` wrote to its error stream."""
        return self._file("err", rank).read_text(encoding="utf-8")

    def checkpoint(self, name: str = "checkpoint_last.pt") -> dict[str, Any]:
        """A checkpoint of ours, whole."""
        return torch.load(self.save_dir / name, map_location="cpu", weights_only=False)

    def _file(self, kind: str, rank: int) -> Path:
        return self.save_dir.with_name(f"{self.save_dir.name}.{kind}-{rank}")

    def _end(self, seconds: float) -> list[int | None]:
        """Exit codes when all have ended, one has failed (the others are killed then), or time is up (all are)."""
        end = time.monotonic() + seconds
        while True:
            codes = [process.poll() for process in self.processes]
            if all(code is not None for code in codes):
                return codes
            if any(code for code in codes) or time.monotonic() > end:
                with contextlib.suppress(subprocess.TimeoutExpired):  # let the others say what they have to say
                    self.processes[0].wait(5.0 if any(code for code in codes) else 0.0)
                codes = [process.poll() for process in self.processes]
                self.kill()
                return codes
            time.sleep(0.02)

    def _tails(self) -> str:
        files = [self._file(kind, rank) for rank in range(len(self.processes)) for kind in ("out", "err")]
        return "\n".join(f"--- {file.name}\n{file.read_text(encoding='utf-8')[-3000:]}" for file in files)


class Trainings:
    """Starts trainings below one folder, and ends whatever still runs when closed."""

    def __init__(self, folder: Path, toy: Toy) -> None:
        """All trainings of a test share `folder`: `exchange` is the peers' store, the rest are save dirs."""
        self.folder, self.toy = folder, toy
        self.exchange = folder / "exchange"
        self._started: list[Training] = []
        # Apart from the machine's own, so that killed processes leave nothing there; short, for sockets' sake.
        self._temporary = tempfile.TemporaryDirectory(prefix="cd-", ignore_cleanup_errors=True)

    def __enter__(self) -> Trainings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for training in self._started:
            training.kill()
        self._temporary.cleanup()

    def stock(self, name: str, *flags: str | Path, **how: Any) -> Training:
        """A plain fairseq training; `how` is what `start` takes."""
        return self.start(name, "--criterion", "label_smoothed_cross_entropy", *flags, **how)

    def peer(self, number: int, *flags: str | Path, run_id: str = "run", peers: int = 2, **how: Any) -> Training:
        """Peer `number`, with the seed `number + 1` if `how` (see `start`) has no other; started again it resumes."""
        how = {"seed": number + 1, **how}
        return self.start(
            f"{run_id}-{number}",
            *("--user-dir", USER_DIR, "--criterion", "codistill", "--codistill-dir", self.exchange),
            *("--codistill-run-id", run_id, "--codistill-peer", str(number), "--codistill-peers", str(peers)),
            *("--codistill-interval", "5", "--codistill-timeout", "120"),
            *flags,
            **how,
        )

    def start(
        self,
        name: str,
        *flags: str | Path,
        seed: int = 1,
        updates: int = 20,
        workers: int = 1,
        ddp_backend: str = "legacy_ddp",
        model: Sequence[str] = TRANSFORMER,
        task: Sequence[str] = TRANSLATION,
        data: Path | None = None,
        pause: float = 0.0,
        env: Mapping[str, str] | None = None,
        gpu: bool = False,
    ) -> Training:
        """Start fairseq-train with `flags`, which may repeat and thereby override what is set here.

        Args:
            name: of the save dir.
            flags: for fairseq-train.
            seed: `--seed`.
            updates: `--max-update`.
            workers: data-parallel CPU workers.
            ddp_backend: `--ddp-backend`, with several workers.
            model: flags of the architecture.
            task: flags of the task.
            data: data folder, instead of the toy corpus for translation.
            pause: seconds that every batch takes longer.
            env: environment variables to set.
            gpu: instead of the CPU.
        """
        common = [
            *("train", str(data or self.toy.translation), *TRAINING, *model, *task),
            *("--seed", str(seed), "--max-update", str(updates), "--save-dir", str(self.folder / name)),
            *(() if gpu else ("--cpu",)),
            *map(str, flags),
        ]
        commands = [[*common, *self._place(rank, workers, ddp_backend)] for rank in range(workers)]
        return self.launch(name, commands, pause=pause, env=env)

    def launch(
        self, name: str, commands: Sequence[Sequence[str]], pause: float = 0.0, env: Mapping[str, str] | None = None
    ) -> Training:
        """Start one process for each of `commands`, fairseq's command and its arguments."""
        env = {"TMPDIR": self._temporary.name, **(env or {})}
        training = Training(self.folder / name, commands, env, pause)
        self._started.append(training)
        return training

    def _place(self, rank: int, workers: int, ddp_backend: str) -> list[str]:
        if workers == 1:
            return []
        # A file to meet at, since a free port may be taken before it is used.
        meeting = Path(self._temporary.name) / f"meeting-{len(self._started)}"
        return [
            *("--distributed-backend", "gloo", "--distributed-no-spawn", "--device-id", "0"),
            *("--distributed-world-size", str(workers), "--distributed-rank", str(rank)),
            *("--distributed-init-method", f"file://{meeting}", "--ddp-backend", ddp_backend),
        ]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last may just be being written."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
