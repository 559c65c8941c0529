"""From a training as the figures name it to the arm that trains it.

A `Cell` is a training without its seed, told by how it differs from the task's base. Figures that show the same cell
share its trainings: the folder follows from all that matters.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from recipes.embedded.nmt.arms import Arm as NmtArm
from recipes.embedded.nmt.settings import Corpus
from recipes.embedded.nmt.settings import Training as NmtTraining
from recipes.embedded.reproduce import settings
from recipes.embedded.reproduce.settings import Kind, Schedule, Task, Tuned, Way
from recipes.embedded.variants import CHECKPOINT, Variant
from recipes.embedded.vision.arms import Arm as VisionArm
from recipes.embedded.vision.settings import Training as VisionTraining

Arm = VisionArm | NmtArm


@dataclass(frozen=True)
class Cell:
    """One training; what is not given is the base's.

    Args:
        task: what is learnt by what.
        way: all_reduce is one model on two workers, codistill are peers of one worker each.
        schedule: of the learning rate (images only).
        decreasing: the weight decay falls with the shifted milestones (images only).
        part: 1/part of the training images, for part times the epochs.
        batch: times the base's images per worker, for as many times fewer updates at as many times the learning rate.
        lr: times the tuned learning rate.
        often: snapshots so many times as often.
        alpha: weight of the penalty; 0: independent models.
        growth: factor of alpha after every epoch.
        peers: models.
        smoothing: of the labels; None: the base's.
        tuned: in place of what was chosen.
    """

    task: Task
    way: Way
    schedule: Schedule = "shifted"
    decreasing: bool = True
    part: int = 1
    batch: int = 1
    lr: float = 1.0
    often: float = 1.0
    alpha: float = 1.0
    growth: float = 1.0
    peers: int = 2
    smoothing: float | None = None
    tuned: Tuned | None = None

    @property
    def slug(self) -> str:
        """Its name in files: task, way, and what differs from the base."""
        words = [self.task, self.way]
        for entry in fields(self)[2:]:
            value = getattr(self, entry.name)
            if value != entry.default:
                shown = f"{value.lr:g}-{value.regularisation:g}" if isinstance(value, Tuned) else value
                words.append(f"{entry.name}-{shown:g}" if isinstance(shown, float) else f"{entry.name}-{shown}")
        return "_".join(words)

    @property
    def kind(self) -> Kind:
        """Whose settings were searched for it."""
        if self.schedule == "goyal":
            return "constant"
        return "independent" if self.alpha == 0 else self.way

    @property
    def metric(self) -> str:
        """What tells how good it is."""
        return "valid_nll" if self.task == "nmt" else "top1"


@dataclass(frozen=True)
class Place:
    """Where data and trainings lie, and at which size.

    Args:
        data: holds the demo's folders and our own.
        quick: a few updates of each, to try that everything works.
    """

    data: Path
    quick: bool = False

    @property
    def own(self) -> Path:
        """The reproduction's folder."""
        return self.data / "reproduce"

    @property
    def digits(self) -> Path:
        """The images."""
        return self.own / f"digits-{settings.VALIDATION}"

    def arm(self, cell: Cell, seed: int) -> Arm:
        """What trains `cell` from `seed`."""
        return self._translation(cell, seed) if cell.task == "nmt" else self._vision(cell, seed)

    def _vision(self, cell: Cell, seed: int) -> VisionArm:
        tuned = _tuned(cell)
        images, batch = settings.IMAGES // cell.part, settings.BATCH * cell.batch
        epochs = (settings.QUICK_EPOCHS if self.quick else settings.EPOCHS) * cell.part
        milestones = settings.MILESTONES[cell.schedule]
        decay = tuple((share, factor * tuned.regularisation) for share, factor in settings.DECREASE)
        training = VisionTraining(
            updates=epochs * images // batch,
            images=images,
            batch=batch,
            scans=settings.IMAGES,
            augment=settings.CROP,
            warmup=settings.WARMUP,
            milestones=milestones,
            weight_decay=tuned.regularisation,
            decay=decay if cell.decreasing else (),
            smoothing=cell.smoothing or 0.0,
            validations=settings.VALIDATIONS,
            validation=settings.VALIDATION,
            by_update=True,
            shuffled=True,
            alpha=float(cell.alpha),
            burn_in=0,
            interval=round(settings.INTERVAL / cell.often),
            lr={cell.way: tuned.lr * cell.lr * cell.batch},
            **settings.MODELS[cell.task],
        )
        return VisionArm(cell.way, seed, training, self.digits, self.own / "vision", _variant(cell))

    def _translation(self, cell: Cell, seed: int) -> NmtArm:
        tuned = _tuned(cell)
        base = NmtTraining()
        if self.quick:
            updates = settings.QUICK_UPDATES
            base = replace(
                base, updates=updates, evaluate_every=updates // 2, warmup=updates // 4, burn_in=updates // 3
            )
        training = replace(
            base,
            seed=10 * seed + 1,  # and the next ones, a peer each
            lr=tuned.lr * cell.lr,
            alpha=float(cell.alpha),
            interval=round(settings.NMT_INTERVAL / cell.often),
            label_smoothing=base.label_smoothing if cell.smoothing is None else cell.smoothing,
            dropout={cell.way: tuned.regularisation},
        )
        corpus = self.data / "nmt" / "corpus"
        return NmtArm(cell.way, Corpus(), training, corpus, self.own / "nmt", _variant(cell))


def _tuned(cell: Cell) -> Tuned:
    if cell.tuned is not None:
        return cell.tuned
    tuned = settings.CHOSEN[cell.task, cell.kind]
    if cell.kind == "constant" and cell.way == "codistill":
        # Out of the box: the baseline's own, at the learning rate that goes with half the batch.
        return replace(tuned, lr=tuned.lr / 2)
    return tuned


def _variant(cell: Cell) -> Variant:
    """Peers wait for each other's snapshots, so that nothing but the seed decides what comes out."""
    if cell.way == "all_reduce":
        return CHECKPOINT
    flags: tuple[str, ...] = ("--codistill-sync",)
    if cell.growth != 1:
        flags += ("--codistill-alpha-growth", f"{cell.growth:g}")
    return Variant(cell.way, flags, peers=cell.peers)
