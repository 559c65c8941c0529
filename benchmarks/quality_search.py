"""How the settings of the question `quality` were chosen: `python -m benchmarks.quality_search`, resumable.

Every method goes through the same number of trainings, over loopback, from seeds that the question does not use, judged
at their end on data that it does not report: the task's learning rates (and dropouts), then two more values of the
method's own knob, or two finer learning rates where it has none. `ddp-fp16` takes what is best for `ddp`, which differs
in rounding alone. It needs no clock, may run beside other work, and with `--jobs` runs many trainings side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from statistics import mean
from typing import Any

from benchmarks import quality_tasks
from benchmarks.contenders import METHODS, has_torchft
from benchmarks.quality_tasks import TASKS, TUNING, quiet
from benchmarks.quality_training import Trial, train
from recipes.embedded.processes import ProcessFailed
from recipes.embedded.steps import exclusive

SEEDS = {"digits": (11, 12), "translation": (11,)}
FIRST = {"digits": {"lr": 0.1}, "translation": {"lr": 3e-3, "dropout": 0.2}}
RATES = {"digits": (0.03, 0.3), "translation": (1.5e-3, 6e-3)}
DROPOUTS = {"digits": (), "translation": (0.1, 0.3)}
KNOBS = {
    "powersgd": ("powersgd_rank", (1, 4)),
    "post-local-sgd": ("period", (10, 40)),
    "diloco": ("outer_lr", (0.4, 1.0)),
    "checkpoint": ("alpha", (0.5, 2.0)),
    "prediction": ("alpha", (0.5, 2.0)),
}
FINER = (0.55, 1.8)


def search(task: str, method: str, pool: Executor) -> Iterator[tuple[Trial, float, bool]]:
    """Each trial with its score, and whether it is the best so far; those of a stage are trained side by side."""
    best, least = Trial(task, method, SEEDS[task][0], part=TUNING, **FIRST[task]), math.inf
    for others in (_itself, _dropouts, _rates, _knobs):
        trials = others(best)
        for trial, found in zip(trials, scores(trials, pool), strict=True):
            better = found < least
            if better:
                best, least = trial, found
            yield trial, found, better


def scores(trials: Sequence[Trial], pool: Executor) -> Iterator[float]:
    """Mean over seeds and models at the end of each training; infinite if that was not reached."""
    begun = [[pool.submit(train, dataclasses.replace(one, seed=seed)) for seed in SEEDS[one.task]] for one in trials]
    for trainings in begun:
        try:
            yield mean(model["quality"][-1] for one in trainings for model in one.result()["models"])
        except ProcessFailed as error:
            print(f"  {error}", flush=True)
            yield math.inf


def _itself(best: Trial) -> list[Trial]:
    return [best]


def _dropouts(best: Trial) -> list[Trial]:
    return [dataclasses.replace(best, dropout=dropout) for dropout in DROPOUTS[best.task]]


def _rates(best: Trial) -> list[Trial]:
    return [dataclasses.replace(best, lr=lr) for lr in RATES[best.task]]


def _knobs(best: Trial) -> list[Trial]:
    if best.method not in KNOBS:
        return [dataclasses.replace(best, lr=round(factor * best.lr, 6)) for factor in FINER]
    name, values = KNOBS[best.method]
    return [dataclasses.replace(best, options={**best.options, name: value}) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_search", description=__doc__)
    parser.add_argument("task", nargs="*", help=f"some of {', '.join(TASKS)}; all without it")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, of two processes each (1)")
    args = parser.parse_args()
    quiet()
    methods = [name for name in METHODS if name != "ddp-fp16" and (name != "diloco" or has_torchft())]
    with (
        exclusive(quality_tasks.DATA / "quality"),
        ProcessPoolExecutor(args.jobs, get_context("spawn"), quiet) as pool,
        ThreadPoolExecutor(min(args.jobs, len(methods))) as searching,
    ):
        for task in args.task or TASKS:
            TASKS[task].prepare()
            chosen = list(searching.map(lambda method, task=task: report(task, method, pool), methods))
            print(f"\n{task}, chosen:", flush=True)
            for method, settings in zip(methods, chosen, strict=True):
                print(f'  "{method}": {settings},', flush=True)


def report(task: str, method: str, pool: Executor) -> dict[str, Any]:
    """Show the trials of a method, judged at the end; the settings of the best."""
    chosen: dict[str, Any] = {}
    for trial, found, better in search(task, method, pool):
        tuned = {"lr": trial.lr, "dropout": trial.dropout, **trial.options}
        words = f"{task}, {method}, " + ", ".join(f"{name} {value:g}" for name, value in tuned.items())
        mark = "best so far" if better else ""
        print(f"  {words:<70} {found:7.3f} {TASKS[task].unit}  {mark}".rstrip(), flush=True)
        if better:
            chosen = {"lr": trial.lr, "dropout": trial.dropout, "options": dict(trial.options)}
    return chosen


if __name__ == "__main__":
    main()
