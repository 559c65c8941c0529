"""The three trainings, as commands a user could type; only the arm's own flags differ.

all_reduce: one model on two data-parallel workers. codistill: two peers of one worker each. alone: one model on one
worker. Every worker takes the same number of updates at the same batch size (the paper's rule of comparison). The
baselines use the same criterion with one peer: it trains as fairseq's own does, and reports the distance from
initialisation.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.embedded.nmt.settings import DEEPER, Corpus, Training
from recipes.embedded.processes import Command, free_port, loopback_interface
from recipes.embedded.steps import StepError, digest
from recipes.embedded.variants import CHECKPOINT, Variant

_ENV = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Arm:
    """One training and the folder that is its own.

    Args:
        name: one of `settings.ARMS`.
        corpus: what it trains on.
        training: the regime; `dropout[name]` is this arm's.
        data: the prepared corpus' folder.
        arms: folder under which the arm's own lies.
        variant: how the arm `codistill` does it.
    """

    name: str
    corpus: Corpus
    training: Training
    data: Path
    arms: Path
    variant: Variant = CHECKPOINT

    @property
    def dropout(self) -> float:
        """This arm's dropout."""
        return self.training.dropout[self.name]

    @property
    def settings(self) -> dict[str, Any]:
        """All that its outcome depends on; the other arms' dropout is no part of it."""
        training = {key: value for key, value in asdict(self.training).items() if key != "dropout"}
        variant = {} if self.variant == CHECKPOINT else {"variant": asdict(self.variant)}
        same = {"arm": self.name, "corpus": asdict(self.corpus), "training": training, "dropout": self.dropout}
        return {**same, **variant}

    @property
    def folder(self) -> Path:
        """Where the arm keeps its logs and checkpoints."""
        name = self.name if self.variant == CHECKPOINT else self.variant.name
        return self.arms / f"{name}-dropout-{self.dropout:g}-{digest(self.settings)}"

    @property
    def members(self) -> int:
        """Models that come out: the peers, or one."""
        return self.variant.peers if self.name == "codistill" else 1

    @property
    def workers(self) -> int:
        """Data-parallel workers of one model."""
        return 2 if self.name == "all_reduce" else 1

    def save_dir(self, member: int) -> Path:
        """Save dir of one model (checkpoints, metrics.jsonl)."""
        return self.folder / f"model-{member}"

    def log(self, member: int, worker: int = 0) -> Path:
        """Output of one process; worker 0's holds the numbers."""
        return self.folder / f"train-{member}-worker-{worker}.log"

    def train_commands(self) -> list[Command]:
        """One command a process, all to be run side by side."""
        port = free_port()
        env = {**_ENV, "GLOO_SOCKET_IFNAME": loopback_interface()} if self.workers > 1 else _ENV
        return [
            Command(f"{self.name} model {member} worker {worker}", argv, self.log(member, worker), env)
            for member in range(self.members)
            for worker in range(self.workers)
            for argv in [[*self._shared(member), *self._peers(member), *self._data_parallel(worker, port)]]
        ]

    def generate_command(self, member: int, out: Path) -> Command:
        """Translate the test set with the checkpoint of the lowest validation NLL; the output goes to `out`."""
        argv = [sys.executable, "-m", "fairseq_cli.generate", str(self.data / "bin"), "--user-dir", user_dir()]
        argv += ["--path", str(self.save_dir(member) / "checkpoint_best.pt"), "--gen-subset", "test", "--cpu"]
        argv += ["--beam", "5", "--max-len-a", "1.5", "--max-len-b", "10", "--max-tokens", "4000"]
        argv += ["--remove-bpe", "sentencepiece", "--num-workers", "0"]
        return Command(f"fairseq-generate {self.name} model {member}", argv, out, _ENV)

    def _shared(self, member: int) -> list[str]:
        t = self.training
        layers = DEEPER if self.variant.unlike and member % 2 else t.layers
        sizes = {"layers": layers, "embed-dim": t.dim, "ffn-embed-dim": t.ffn, "attention-heads": t.heads}
        argv = [sys.executable, "-m", "fairseq_cli.train", str(self.data / "bin"), "--cpu", "--num-workers", "0"]
        argv += ["--user-dir", user_dir(), "--criterion", "codistill", "--label-smoothing", str(t.label_smoothing)]
        argv += ["--arch", "transformer", "--share-all-embeddings", "--dropout", str(self.dropout)]
        for name, size in sizes.items():
            argv += [f"--encoder-{name}", str(size), f"--decoder-{name}", str(size)]
        argv += ["--optimizer", "adam", "--lr", str(t.lr), "--lr-scheduler", "inverse_sqrt"]
        argv += ["--warmup-updates", str(t.warmup), "--max-tokens", str(t.tokens), "--max-update", str(t.updates)]
        argv += ["--max-tokens-valid", "4000", "--validate-interval-updates", str(t.evaluate_every)]
        argv += ["--save-interval-updates", str(t.evaluate_every), "--keep-interval-updates", "1"]
        argv += ["--validate-interval", "1000000", "--save-interval", "1000000", "--no-epoch-checkpoints"]
        argv += ["--best-checkpoint-metric", "nll_loss", "--save-dir", str(self.save_dir(member))]
        argv += ["--log-format", "json", "--log-interval", "20"]
        return argv

    def _peers(self, member: int) -> list[str]:
        t = self.training
        argv = ["--seed", str(t.seed + member), "--codistill-peers", str(self.members)]
        argv += ["--codistill-interval", str(t.interval)]
        if self.members > 1:
            argv += ["--codistill-dir", str(self.folder / "exchange"), "--codistill-peer", str(member)]
            argv += ["--codistill-loss", "kl", "--codistill-alpha", str(t.alpha)]
            argv += ["--codistill-burn-in", str(t.burn_in), *self.variant.flags]
        return argv

    def _data_parallel(self, worker: int, port: int) -> list[str]:
        if self.workers == 1:
            return ["--distributed-world-size", "1"]
        argv = ["--distributed-world-size", str(self.workers), "--distributed-rank", str(worker)]
        argv += ["--distributed-backend", "gloo", "--distributed-no-spawn", "--device-id", "0"]
        argv += ["--distributed-init-method", f"tcp://127.0.0.1:{port}", "--ddp-backend", "legacy_ddp"]
        return argv


def user_dir() -> str:
    """The plug-in's folder, as `codistill user-dir fairseq` prints it.

    Raises:
        StepError: the plug-in cannot be found.
    """
    spec = importlib.util.find_spec("fairseq_codistill")
    if spec is None or spec.origin is None:
        raise StepError("the package fairseq_codistill is not installed: run `make env` in the repository's root")
    return str(Path(spec.origin).resolve().parent)
