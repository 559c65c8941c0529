"""Trains runs one after another, each once, and evaluates them; says how long the rest takes.

A finished run is reused. Of what it leaves, the exchange and all checkpoints but one of each model are deleted. An
interrupted run starts again: its folder counts only when its mark is there.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from recipes.embedded import measures
from recipes.embedded.nmt import demo as nmt
from recipes.embedded.nmt.settings import Corpus
from recipes.embedded.processes import Command, ProcessFailed, run_all
from recipes.embedded.progress import Progress, clock
from recipes.embedded.reproduce import settings
from recipes.embedded.reproduce.figures import Figure
from recipes.embedded.reproduce.results import EVALUATION, diverged
from recipes.embedded.reproduce.settings import Task
from recipes.embedded.reproduce.trainings import Arm, Cell, Place
from recipes.embedded.steps import exclusive, finished, step

RUN_SECONDS = 3600.0  # after which a training is given up
EVALUATION_SECONDS = 3600.0
# Of a training on two cores, until one of its task has been measured here.
GUESS: Mapping[Task, float] = {"resnet": 40.0, "resnext": 60.0, "nmt": 120.0}
QUICK_GUESS = 15.0


@dataclass(frozen=True)
class Run:
    """A cell from one seed, and why it is trained."""

    cell: Cell
    seed: int
    why: str
    arm: Arm

    @property
    def seconds(self) -> float | None:
        """What it took; None until it is finished."""
        facts = finished(self.arm.folder, self.arm.settings)
        return None if facts is None else float(facts["seconds"])

    @property
    def update(self) -> int:
        """The update of the last model, as far as its metrics tell."""
        return min(int(seen[-1]["update"]) if seen else 0 for seen in self._metrics())

    def check(self) -> None:
        """See that what was to codistil did, from the second interval after the burn-in on.

        Raises:
            ProcessFailed: some model met an incident, or was without one of its peers at the end of too many intervals.
        """
        if self.cell.way == "all_reduce" or self.cell.alpha == 0:
            return
        faults = [fault for member, rows in enumerate(self._metrics()) if (fault := self._fault(member, rows))]
        if faults and not diverged(self.arm):  # whose weights the others refuse, and that is its result
            raise ProcessFailed(f"{faults[0]}; see its log")

    def _fault(self, member: int, rows: Sequence[Mapping[str, Any]]) -> str:
        training = self.arm.training
        late = [row for row in rows if row["update"] > training.burn_in + training.interval]
        tied = measures.together(late, self.arm.members - 1)
        if late and tied < settings.TOGETHER:
            return f"model {member} had all its peers in {tied:.0%} of its intervals"
        if late and late[-1]["incidents"]:
            return f"model {member} met {late[-1]['incidents']} incidents"
        return ""

    def _metrics(self) -> list[list[dict[str, Any]]]:
        """Of every model what it has logged so far."""
        logs = [self.arm.save_dir(member) / "metrics.jsonl" for member in range(self.arm.members)]
        return [measures.read_metrics(log) if log.exists() else [] for log in logs]


def runs_of(figures: Iterable[Figure], place: Place) -> list[Run]:
    """What the figures need, each run once, in the order of the figures; a quick place has the first seed alone."""
    found: dict[tuple[Cell, int], Run] = {}
    for figure in figures:
        for seed in figure.seeds[:1] if place.quick else figure.seeds:
            for cell in figure.cells():
                found.setdefault((cell, seed), Run(cell, seed, f"figure {figure.key}", place.arm(cell, seed)))
    return list(found.values())


def seconds_left(runs: Sequence[Run], quick: bool = False) -> float:
    """What the unfinished runs take, by what those like them took for each model."""
    took = [(run, seconds) for run in runs if (seconds := run.seconds) is not None]

    def expected(run: Run) -> float:
        for same in (_kind, lambda other: (other.cell.task, other.cell.way), lambda other: other.cell.task):
            alike = [seconds / other.cell.peers for other, seconds in took if same(other) == same(run)]
            if alike:
                return run.cell.peers * mean(alike)
        return QUICK_GUESS if quick else GUESS[run.cell.task] * run.cell.peers / 2

    return sum(expected(run) for run in runs if run.seconds is None)


def inventory(runs: Sequence[Run], place: Place) -> list[str]:
    """A line a run, and one with the time they take."""
    lines = [
        f"{run.why}: {run.cell.slug}, seed {run.seed}{'' if run.seconds is None else ', finished'}" for run in runs
    ]
    return [*lines, f"{len(runs)} trainings, {_duration(seconds_left(runs, place.quick))} left"]


def prepare(place: Place, tasks: Iterable[Task], progress: Progress) -> None:
    """Make the data that these tasks need, unless it is there."""
    wanted = set(tasks)
    if wanted & {"resnet", "resnext"}:
        from recipes.embedded.vision.data import write_digits

        write_digits(place.digits, validation=settings.VALIDATION)
    if "nmt" in wanted:
        with exclusive(place.data / "nmt"):
            nmt.prepare_corpus(place.data, Corpus(), progress)


def train(runs: Sequence[Run], place: Place, progress: Progress) -> list[Run]:
    """Train the runs that are not finished; returns those that failed, which the next call tries again."""
    todo = [run for run in runs if run.seconds is None]
    progress.say(f"{len(runs)} trainings, {len(runs) - len(todo)} of them finished")
    failed = []
    for run in todo:
        number = 1 + runs.index(run)
        left = seconds_left(runs, place.quick)
        label = f"[{number}/{len(runs)}, {run.why}] {run.cell.slug}, seed {run.seed}"

        def build(folder: Path, run: Run = run, label: str = label, left: float = left) -> Mapping[str, float]:
            watch = _watch(run, label, left, progress)
            seconds = run_all(run.arm.train_commands(), limit=RUN_SECONDS, watch=watch)
            run.check()
            _tidy(folder)
            return {"seconds": seconds}

        progress.show(f"{label}: starting, {_duration(left)} left")
        try:
            seconds = step(run.arm.folder, run.arm.settings, build)["seconds"]
        except ProcessFailed as error:
            progress.say(f"{label}: {error}")
            failed.append(run)
        else:
            progress.say(f"{label}: {clock(seconds)}, {_duration(seconds_left(runs, place.quick))} left")
    return failed


def evaluate(runs: Sequence[Run], place: Place, progress: Progress) -> None:
    """Judge the runs' models beyond what the trainings say themselves, unless that is done."""
    todo = [run for run in runs if not (run.arm.folder / EVALUATION).exists()]
    for kind, data in (("vision", place.digits), ("nmt", place.data / "nmt" / "corpus")):
        folders = [str(run.arm.folder) for run in todo if (run.cell.task == "nmt") == (kind == "nmt")]
        if not folders:
            continue
        progress.show(f"evaluating {len(folders)} trainings of {kind}")
        module = "recipes.embedded.reproduce.evaluate"
        argv = [sys.executable, "-m", module, kind, str(data), *folders]
        run_all(
            [Command(module, argv, place.own / f"evaluate-{kind}.log", {"OMP_NUM_THREADS": "1"})],
            limit=EVALUATION_SECONDS,
        )


def _kind(run: Run) -> tuple[object, ...]:
    """What decides how long a run takes."""
    return run.cell.task, run.cell.way, run.cell.peers, run.cell.batch


def _watch(run: Run, label: str, left: float, progress: Progress) -> Callable[[], None]:
    since = time.monotonic()

    def watch() -> None:
        rest = _duration(left - (time.monotonic() - since))
        progress.show(f"{label}: update {run.update}/{run.arm.training.updates}, {rest} left")

    return watch


def _tidy(folder: Path) -> None:
    shutil.rmtree(folder / "exchange", ignore_errors=True)
    for model in folder.glob("model-*"):
        for checkpoint in (*model.glob("checkpoint*"), *model.glob("model_best*")):
            if checkpoint.name != "checkpoint_best.pt":
                checkpoint.unlink()


def _duration(seconds: float) -> str:
    minutes = max(0, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min"
