"""The timm half of `make demo`: the digits, three arms from several seeds, one table and one picture.

Every finished training is reused; an interrupted one starts again clean. Whatever goes wrong ends in one line and exit
status 1 (Ctrl-C and SIGTERM: 130), with no process left behind.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from codistill import plots
from recipes.embedded import commandline, measures
from recipes.embedded.processes import run_all
from recipes.embedded.progress import Pace, Progress, clock
from recipes.embedded.report import table, thousands
from recipes.embedded.steps import StepError, exclusive, step
from recipes.embedded.vision import results
from recipes.embedded.vision.arms import Arm
from recipes.embedded.vision.settings import ARMS, GRID, GRID_SEEDS, SCANS, SEEDS, VALIDATION, Training

ARM_SECONDS = 600.0
HEADER = ("", "best top-1", "top-1 at end", "valid loss", "distance", "updates", "wall", "bytes/update")
NAMES = {"all_reduce": "all_reduce, 2 workers", "codistill": "codistill, peer {}", "alone": "alone, 1 worker"}


@dataclass(frozen=True)
class Run:
    """What one model came to from one seed; `sent` is in bytes per update and worker."""

    validations: Sequence[results.Validation]
    distance: float
    seconds: float
    sent: float

    @property
    def end(self) -> results.Validation:
        return self.validations[-1]


@dataclass(frozen=True)
class Model:
    """One model from every seed, in the order of the seeds: a row of the table and a curve of the picture."""

    name: str
    runs: Sequence[Run]
    computed: bool  # `sent` was computed, not measured

    def row(self) -> list[str]:
        best = [results.best(run.validations) for run in self.runs]
        columns = [
            spread(best, 1),
            spread([run.end.top1 for run in self.runs], 1),
            spread([run.end.loss for run in self.runs], 3),
            spread([run.distance for run in self.runs], 2),
        ]
        sent = thousands(mean(run.sent for run in self.runs)) + ("*" if self.computed else "")
        return [self.name, *columns, f"{self.runs[0].end.update}", clock(mean(run.seconds for run in self.runs)), sent]

    def curve(self) -> plots.Curve:
        """Validation error in percent against updates, over the seeds."""
        return plots.mean_of([[(seen.update, 100.0 - seen.top1) for seen in run.validations] for run in self.runs])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo (or the search) and return the exit status."""
    args = _parser().parse_args(argv)

    def work(progress: Progress) -> None:
        training = regime(args.updates)
        if args.search:
            search(args.data, training, progress)
            return
        report, _ = demonstrate(args.data, training, progress)
        progress.say(f"\n{report}\n\nvalidation curves: {args.data / 'vision' / 'demo.png'}")

    return commandline.run(work)


def regime(updates: int | None) -> Training:
    """The settings, with another number of updates where one is given.

    Raises:
        StepError: that number is not a whole number of epochs.
    """
    try:
        return Training() if updates is None else Training(updates=updates)
    except ValueError as error:
        raise StepError(f"--updates {error}") from error


def demonstrate(data: Path, training: Training, progress: Progress) -> tuple[str, plots.Panel]:
    """Train what is not trained yet below `data`/vision, and leave demo.txt and demo.png there.

    Returns:
        The table with its notes, and the validation curves.
    """
    with exclusive(data / "vision"):
        digits = prepare_digits(data, progress)
        trainings = [(name, seed) for name in ARMS for seed in SEEDS]
        arms = [Arm(name, seed, training, digits, data / "vision" / "arms") for name, seed in trainings]
        runs: dict[str, list[list[Run]]] = {name: [] for name in ARMS}
        for number, arm in enumerate(arms, start=1):
            seconds = train_arm(arm, f"[{number}/{len(arms)} {arm.name}, seed {arm.seed}]", progress)
            runs[arm.name].append(read_arm(arm, seconds))
        models = [
            Model(NAMES[name].format(member), same, name == "all_reduce")
            for name, seeds in runs.items()
            for member, same in enumerate(zip(*seeds, strict=True))
        ]
        panel = _panel(models, training)
        plots.draw(data / "vision" / "demo.png", [panel])
        report = _report(models, training)
        (data / "vision" / "demo.txt").write_text(report + "\n", encoding="utf-8")
    return report, panel


def search(data: Path, training: Training, progress: Progress) -> None:
    """Train every arm at every learning rate of the grid, from the grid's seeds, and compare their top-1."""
    with exclusive(data / "vision"):
        digits = prepare_digits(data, progress)
        cells = [(name, lr) for name in ARMS for lr in GRID]
        rows = []
        for number, (name, lr) in enumerate(cells, start=1):
            runs = []
            for seed in GRID_SEEDS:
                chosen = replace(training, lr={**training.lr, name: lr})
                arm = Arm(name, seed, chosen, digits, data / "vision" / "arms")
                label = f"[{number}/{len(cells)} {name}, learning rate {lr:g}, seed {seed}]"
                runs += read_arm(arm, train_arm(arm, label, progress))
            best = spread([results.best(run.validations) for run in runs], 1)
            end = spread([run.end.top1 for run in runs], 1)
            rows.append([name, f"{lr:g}", best, end, spread([run.end.loss for run in runs], 3)])
        progress.say("\n" + table(("arm", "learning rate", "best top-1", "top-1 at end", "valid loss"), rows))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; the mean alone of a single value, or when one is not finite."""
    centre = f"{mean(values):.{digits}f}"
    alone = len(values) == 1 or not all(map(math.isfinite, values))
    return centre if alone else f"{centre} ± {stdev(values):.{digits}f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.embedded.vision.demo",
        description="Two peers codistil on scikit-learn's digits, beside one all_reduce model on the same two workers "
        f"and one model alone, from {len(SEEDS)} seeds each. About four minutes of training on two CPU cores, once.",
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for results (data)")
    parser.add_argument("--updates", type=commandline.updates, help=f"updates of every worker ({Training().updates})")
    parser.add_argument(
        "--search", action="store_true", help=f"instead, train every arm at learning rate {GRID} and compare top-1"
    )
    return parser


def prepare_digits(data: Path, progress: Progress) -> Path:
    from recipes.embedded.vision.data import write_digits  # imports scikit-learn, which --help need not wait for

    folder = write_digits(data / "vision" / "digits")
    progress.say(f"digits: {SCANS} scans to draw the training images from, {VALIDATION} to validate")
    return folder


def train_arm(arm: Arm, label: str, progress: Progress) -> float:
    """Train the arm unless that is done; return the wall time it took, in seconds."""

    def build(folder: Path) -> Mapping[str, float]:
        progress.show(f"{label} starts, logs in {folder}")
        return {"seconds": run_all(arm.train_commands(), limit=ARM_SECONDS, watch=_watch(arm, label, progress))}

    seconds = float(step(arm.folder, arm.settings, build)["seconds"])
    best = ", ".join(f"{results.best(_validations(arm, member)):.1f}" for member in range(arm.members))
    progress.say(f"{label} trained in {clock(seconds)}, best top-1 {best}")
    return seconds


def _watch(arm: Arm, label: str, progress: Progress) -> Callable[[], None]:
    pace = Pace(arm.training.updates)

    def watch() -> None:
        seen = [_validations(arm, member) for member in range(arm.members)]
        if not all(seen):
            progress.show(f"{label} starting")
            return
        update = min(validations[-1].update for validations in seen)
        top1 = ", ".join(f"{validations[-1].top1:.1f}" for validations in seen)
        progress.show(f"{label} update {update}/{arm.training.updates}, top-1 {top1}, ETA {pace.left(update)}")

    return watch


def _validations(arm: Arm, member: int) -> list[results.Validation]:
    """Of every arm after the same updates, however long its epochs are: a best of more would be a better one."""
    every = arm.training.images // arm.training.batch
    return results.read_summary(arm.save_dir(member) / "summary.csv", arm.updates_per_epoch, every)


def read_arm(arm: Arm, seconds: float) -> list[Run]:
    runs = []
    for member in range(arm.members):
        metrics = measures.read_metrics(arm.save_dir(member) / "metrics.jsonl")
        if arm.workers > 1:
            size = results.parameters(arm.save_dir(member) / "codistill-init.safetensors")
            sent = measures.ring_all_reduce_bytes(size, arm.workers)
        else:
            sent = measures.sent_bytes(metrics) / arm.training.updates
        runs.append(Run(_validations(arm, member), measures.distance(metrics), seconds, sent))
    return runs


def _panel(models: Sequence[Model], training: Training) -> plots.Panel:
    return plots.Panel(
        {model.name: model.curve() for model in models},
        "updates",
        "validation error (%)",
        f"timm: {training.images} digits, {len(models[0].runs)} seeds",
        span=30.0,
    )


def _report(models: Sequence[Model], training: Training) -> str:
    lr = ", ".join(f"{name} {value:g}" for name, value in training.lr.items())
    notes = [
        f"top-1: on {VALIDATION} scans, in percent; mean ± standard deviation over {len(models[0].runs)} seeds, which",
        f"  also choose the {training.images} training images. valid loss: cross-entropy in nats, at the end.",
        *_paired(models),
        "distance: L2 from the initial weights, at the end. wall: one seed, with the start of its processes.",
        "bytes/update: sent by one worker; measured for the exchange;",
        f"  * computed for all_reduce: 2(n-1)/n x {measures.FLOAT_BYTES} bytes x parameters, a ring of n = 2 workers.",
        f"learning rate, the best of {GRID} by top-1 at the end: {lr}.",
    ]
    return "\n".join([table(HEADER, [model.row() for model in models]), "", *notes])


def _paired(models: Sequence[Model]) -> list[str]:
    """How far the peers' mean is from either baseline, seed by seed: what the choice of images adds is not in it."""
    peers = [model for model in models if model.name.startswith("codistill")]
    ends = [mean(run.end.top1 for run in runs) for runs in zip(*(peer.runs for peer in peers), strict=True)]
    lines = []
    for other in models:
        if other not in peers:
            gains = [own - run.end.top1 for own, run in zip(ends, other.runs, strict=True)]
            lines.append(f"top-1 at end, peers' mean less {other.name}, seed by seed: {spread(gains, 1)}.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
