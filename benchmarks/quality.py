"""How long does each method take to a given quality, when two workers are joined by 100 Mbit/s?

Two tasks that fit this machine: a ResNet of timm's on 128 digits, and a Transformer of fairseq's on 1,500 pairs of
sentences (`quality_tasks`). Every method gets the same updates and the same batch for each worker; its settings were
searched on other data and from other seeds (`quality_search`). Workers and store are network namespaces, each behind a
link of 100 Mbit/s (`links`); five seeds, one thread a worker. The clock shows training alone: it starts when all are
connected, and models are judged afterwards, on data that neither trained nor chose anything. Where the workers train
one model, the mean of their weights is judged; where they codistil, each of them (shown is the mean of the two).

The target of a seed: 98 % of the way that `ddp` goes with it, from the untrained model to the end. So it is defined for
every task and seed, the same for all methods, and reached by `ddp` itself. A method's time is where its curve, straight
between two looks, first gets there; there is a row for it when it does with every seed.
Bounds: two cores serve both workers, the store's server and the links; the models are small: a second is many
updates.
Finished trainings are kept below data/quality and not repeated: remove that folder to measure anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from benchmarks import quality_tasks
from benchmarks.contenders import METHODS, has_torchft
from benchmarks.links import Unavailable
from benchmarks.quality_tasks import HELD_OUT, TASKS, quiet
from benchmarks.quality_training import Trial, train
from benchmarks.record import Row
from codistill.plots import half_interval
from recipes.embedded.processes import ProcessFailed
from recipes.embedded.steps import StepError, exclusive

TOLERANCE = 0.3
MBIT = 100.0
SEEDS = (1, 2, 3, 4, 5)
WAY = 0.98
# Found by `python -m benchmarks.quality_search`; `ddp-fp16` has those of `ddp`.
CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {
        "ddp": {"lr": 0.3},
        "powersgd": {"lr": 0.1, "options": {"powersgd_rank": 4}},
        "post-local-sgd": {"lr": 0.1},
        "diloco": {"lr": 0.1},
        "checkpoint": {"lr": 0.03},
        "prediction": {"lr": 0.1, "options": {"alpha": 0.5}},
        "alone": {"lr": 0.18},
    },
    "translation": {
        "ddp": {"lr": 3e-3, "dropout": 0.2},
        "powersgd": {"lr": 3e-3, "dropout": 0.1, "options": {"powersgd_rank": 4}},
        "post-local-sgd": {"lr": 3e-3, "dropout": 0.2, "options": {"period": 10}},
        "diloco": {"lr": 1.5e-3, "dropout": 0.3, "options": {"outer_lr": 0.4}},
        "checkpoint": {"lr": 3e-3, "dropout": 0.1, "options": {"alpha": 0.5}},
        "prediction": {"lr": 3e-3, "dropout": 0.1, "options": {"alpha": 0.5}},
        "alone": {"lr": 3e-3, "dropout": 0.1},
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: seconds and quality at every look, the mean over its models; smaller is better."""

    seconds: Sequence[float]
    quality: Sequence[float]
    sent: float = 0.0

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Run:
        models = found["models"]
        means = {
            name: [statistics.fmean(look) for look in zip(*(model[name] for model in models), strict=True)]
            for name in ("seconds", "quality")
        }
        return cls(**means, sent=statistics.fmean(worker["sent"] for worker in found["metrics"]))

    @property
    def end(self) -> float:
        return self.quality[-1]


def target(reference: Run, way: float = WAY) -> float:
    """What to reach: so much of the way from the reference's first look to its last."""
    start = reference.quality[0]
    return start + way * (reference.end - start)


def reached(run: Run, wanted: float) -> Optional[float]:
    """When the quality first gets there, straight between two looks; None: never."""
    looks = list(zip(run.seconds, run.quality, strict=True))
    if looks[0][1] <= wanted:
        return looks[0][0]
    for (before, worse), (after, better) in itertools.pairwise(looks):
        if better <= wanted:
            return before + (after - before) * (worse - wanted) / (worse - better)
    return None


def measure(device: str) -> Iterator[Row]:
    quiet()
    with exclusive(quality_tasks.DATA / "quality"):
        for task in TASKS:
            try:
                found = trained(task)
            except (Unavailable, StepError) as why:
                print(f"  {task} was not measured: {why}", flush=True)
                continue
            if "ddp" in found:
                yield from rows(task, found)


def trained(task: str) -> dict[str, list[Run]]:
    """The runs of every method that can be had here, in the order of the seeds."""
    chosen = {**CHOSEN[task], "ddp-fp16": CHOSEN[task]["ddp"]}
    methods = [method for method in METHODS if method != "diloco" or has_torchft()]
    if "diloco" not in methods:
        print("  diloco was not measured: torchft is not installed", flush=True)
    found: dict[str, list[Run]] = {method: [] for method in methods}
    for number, seed in enumerate(SEEDS):
        for method in methods[number:] + methods[:number]:
            trial = Trial(task, method, seed, part=HELD_OUT, mbit=MBIT, **chosen[method])
            try:
                run = Run.of(train(trial))
            except ProcessFailed as why:
                print(f"  {task}: {method} was not measured: {why}", flush=True)
                continue
            found[method].append(run)
            print(f"  {task}: {method}, seed {seed}: {run.end:.3f} after {run.seconds[-1]:.0f} s", flush=True)
    return {method: runs for method, runs in found.items() if len(runs) == len(SEEDS)}


def rows(task: str, found: Mapping[str, Sequence[Run]]) -> Iterator[Row]:
    """Of a task: its target with all curves, then each method beside `ddp`, seed by seed."""
    base = found["ddp"]
    targets = [target(run) for run in base]
    aims = [wanted / run.end for wanted, run in zip(targets, base, strict=True)]
    curves = {method: curve(runs) for method, runs in found.items()}
    shown = {"at the end": spread([run.end for run in base]), "unit": TASKS[task].unit}
    yield Row.of(f"{task}: target / ddp at the end", aims, details={**shown, "curves": curves, "targets": targets})
    for method, runs in found.items():
        if method != "ddp":
            yield from _beside(f"{task}: {method} / ddp", runs, base, targets)


def _beside(name: str, runs: Sequence[Run], base: Sequence[Run], targets: Sequence[float]) -> Iterator[Row]:
    times = [reached(run, wanted) for run, wanted in zip(runs, targets, strict=True)]
    due = [reached(run, wanted) for run, wanted in zip(base, targets, strict=True)]
    there = [(time, other) for time, other in zip(times, due, strict=True) if time is not None and other]
    if len(there) == len(runs):
        seconds = {"seconds": round(statistics.fmean(time for time, _ in there), 1)}
        yield Row.of(f"{name}, time to target", [time / other for time, other in there], details=seconds)
    details = {
        "seconds": round(statistics.fmean(run.seconds[-1] for run in runs), 1),
        "MB sent": round(statistics.fmean(run.sent for run in runs) / 1e6, 1),
        "at the end": spread([run.end for run in runs]),
        "at its best": spread([min(run.quality) for run in runs]),
        "reached": f"{len(there)} of {len(runs)}",
    }
    ratios = [run.end / other.end for run, other in zip(runs, base, strict=True)]
    yield Row.of(f"{name}, at the end", ratios, details=details)


def curve(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Look by look: mean seconds, mean quality, and how far its 95 % interval reaches."""
    return {
        "seconds": [round(statistics.fmean(look), 2) for look in zip(*(run.seconds for run in runs), strict=True)],
        "quality": [round(statistics.fmean(look), 4) for look in zip(*(run.quality for run in runs), strict=True)],
        "interval": [round(half_interval(look), 4) for look in zip(*(run.quality for run in runs), strict=True)],
    }


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {half_interval(values):.2f}"


def draw(rows: Sequence[Row], folder: Path) -> None:
    from benchmarks.quality_plot import draw_panels

    quiet()
    panels = {row.name.split(":")[0]: row.details for row in rows if "curves" in row.details}
    if panels:
        draw_panels(panels, folder / "quality-time.png")
