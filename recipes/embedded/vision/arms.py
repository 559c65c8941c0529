"""The three trainings, as commands a user could type; only the arm's own flags differ.

all_reduce: one model on two data-parallel workers under torchrun. codistill: two peers of one worker each, which
exchange snapshots through a folder. alone: one model on one worker. Every worker takes the same number of updates at
the same batch size (the paper's rule of comparison). The baselines run through `timm_codistill` with one peer too: they
train as train.py does, on the same fraction of the data, and report the distance from initialisation.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.embedded.processes import Command, loopback_interface
from recipes.embedded.steps import digest, plain
from recipes.embedded.variants import CHECKPOINT, Variant
from recipes.embedded.vision.settings import DEEPER, Training

SCRIPT = Path(__file__).with_name("train.py")
_ENV = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Arm:
    """One training from one seed, and the folder that is its own.

    Args:
        name: one of `settings.ARMS`.
        seed: of initial weights and order, and which images of the training split are used.
        training: the regime; `lr[name]` is this arm's.
        data: the digits as an ImageFolder.
        arms: folder under which the arm's own lies.
        variant: how the arm `codistill` does it.
    """

    name: str
    seed: int
    training: Training
    data: Path
    arms: Path
    variant: Variant = CHECKPOINT

    @property
    def lr(self) -> float:
        """This arm's learning rate."""
        return self.training.lr[self.name]

    @property
    def settings(self) -> dict[str, Any]:
        """All that its outcome depends on; the other arms' learning rates are no part of it."""
        training = {key: value for key, value in plain(self.training).items() if key != "lr"}
        variant = {} if self.variant == CHECKPOINT else {"variant": asdict(self.variant)}
        return {"arm": self.name, "seed": self.seed, "training": training, "lr": self.lr, **variant}

    @property
    def folder(self) -> Path:
        """Where the arm keeps its logs and checkpoints."""
        name = self.name if self.variant == CHECKPOINT else self.variant.name
        return self.arms / f"{name}-lr-{self.lr:g}-seed-{self.seed}-{digest(self.settings)}"

    @property
    def members(self) -> int:
        """Models that come out: the peers, or one."""
        return self.variant.peers if self.name == "codistill" else 1

    @property
    def workers(self) -> int:
        """Data-parallel workers of one model."""
        return 2 if self.name == "all_reduce" else 1

    @property
    def updates_per_epoch(self) -> int:
        """Updates that take the model's workers once through the images."""
        return self.training.images // (self.training.batch * self.workers)

    @property
    def epochs(self) -> int:
        """How often every worker's model sees the images."""
        return self.training.updates // self.updates_per_epoch

    def save_dir(self, member: int) -> Path:
        """Save dir of one model (checkpoints, summary.csv, metrics.jsonl)."""
        return self.folder / f"model-{member}"

    def train_commands(self) -> list[Command]:
        """One command a model, all to be run side by side."""
        env = {**_ENV, "GLOO_SOCKET_IFNAME": loopback_interface()} if self.workers > 1 else _ENV
        return [
            Command(
                f"{self.name} seed {self.seed} model {member}",
                [sys.executable, "-m", *self._launcher(), str(SCRIPT), *self._shared(member), *self._peers(member)],
                self.folder / f"train-{member}.log",
                env,
            )
            for member in range(self.members)
        ]

    def _launcher(self) -> list[str]:
        if self.workers == 1:
            return ["timm_codistill"]
        return ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.workers}", "-m", "timm_codistill"]

    def _shared(self, member: int) -> list[str]:
        t = self.training
        argv = ["--data-dir", str(self.data), "--device", "cpu", "--workers", "0", *self._augmentation()]
        argv += ["--smoothing", f"{t.smoothing:g}"]
        model = DEEPER if self.variant.unlike and member % 2 else t.model
        argv += ["--model", model, "--num-classes", "10", "--input-size", "3", str(t.pixels), str(t.pixels)]
        argv += ["--model-kwargs", "channels=" + repr(t.channels).replace(" ", ""), f"stem_width={t.stem}", *t.kwargs]
        argv += [f"pretrained_cfg_overlay={{'crop_pct':{t.crop}}}"]
        argv += ["--opt", "sgd", "--lr", str(self.lr), "--weight-decay", str(t.weight_decay), *self._schedule()]
        argv += ["--batch-size", str(t.batch), "--epochs", str(self.epochs)]
        if t.validations:
            argv += ["--val-interval", str(max(1, self.epochs // t.validations))]
        argv += ["--seed", str(self.seed), "--checkpoint-hist", "1", "--log-interval", "50"]
        if t.shuffled:
            argv += ["--sampler-seed", str(self.seed)]
        argv += ["--output", str(self.folder), "--experiment", self.save_dir(member).name]
        return argv

    def _augmentation(self) -> list[str]:
        crop = self.training.augment
        if crop is None:
            return ["--no-aug"]
        return ["--scale", *(f"{share:g}" for share in crop), "--hflip", "0", "--color-jitter", "0"]

    def _schedule(self) -> list[str]:
        t = self.training
        argv = ["--warmup-epochs", str(self._epoch(t.warmup))]
        if t.by_update or t.milestones:
            argv += ["--sched-on-updates"]
        if not t.milestones:
            return [*argv, "--sched", "cosine"]
        milestones = [str(self._epoch(share)) for share in t.milestones]
        return [*argv, "--sched", "multistep", "--decay-rate", "0.1", "--decay-milestones", *milestones]

    def _epoch(self, share: float) -> int:
        return round(share * self.epochs)

    def _peers(self, member: int) -> list[str]:
        t = self.training
        argv = ["--codistill", "--codistill-peers", str(self.members), "--codistill-interval", str(t.interval)]
        argv += ["--codistill-data-fraction", str(t.images / t.scans), "--codistill-data-seed", str(self.seed)]
        if t.decay:
            schedule = ",".join(f"{self._epoch(share)}:{value:g}" for share, value in t.decay)
            argv += ["--codistill-weight-decay", schedule]
        if self.members > 1:
            argv += ["--codistill-dir", str(self.folder / "exchange"), "--codistill-peer", str(member)]
            argv += ["--codistill-loss", t.loss, "--codistill-alpha", str(t.alpha)]
            argv += ["--codistill-burn-in", str(t.burn_in), *self.variant.flags]
        return argv
