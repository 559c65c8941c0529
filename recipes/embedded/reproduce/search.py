"""The search that `settings.CHOSEN` comes from: every kind of training over the same grid, from seeds of its own.

Its numbers are kept in a folder beside the other results, for the page.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean

from recipes.embedded.progress import Progress
from recipes.embedded.report import table
from recipes.embedded.reproduce import results, runner, settings
from recipes.embedded.reproduce.figures import (
    APART,
    APART_T,
    GOYAL,
    PEERS,
    PEERS_T,
    PEERS_X,
    REDUCE,
    REDUCE_T,
    REDUCE_X,
)
from recipes.embedded.reproduce.results import Results
from recipes.embedded.reproduce.runner import Run
from recipes.embedded.reproduce.settings import Task, Tuned
from recipes.embedded.reproduce.trainings import Cell, Place
from recipes.embedded.reproduce.verdicts import HIGHER_IS_BETTER

NAME = "search"
BASES = (REDUCE, GOYAL, PEERS, APART, REDUCE_X, PEERS_X, REDUCE_T, PEERS_T, APART_T)


def grid(base: Cell) -> dict[Tuned, Cell]:
    """What is tried of one kind of training."""
    return {tuned: replace(base, tuned=tuned) for tuned in settings.GRIDS[base.task]}


def runs_of(place: Place) -> list[Run]:
    """All trainings of the search."""
    seeds = settings.SEARCH_SEEDS[:1] if place.quick else settings.SEARCH_SEEDS
    cells = [cell for base in BASES for cell in grid(base).values()]
    return [Run(cell, seed, "search", place.arm(cell, seed)) for cell in cells for seed in seeds]


def search(place: Place, out: Path, progress: Progress) -> None:
    """Train the grids, write the numbers below `out`, and print what came out with the lines for `settings.CHOSEN`."""
    runs = runs_of(place)
    runner.prepare(place, {run.cell.task for run in runs}, progress)
    runner.train(runs, place, progress)
    results.write(out, [(run.cell, run.seed, run.arm) for run in runs], ())
    found = outcomes(results.read(out))
    rows, chosen = [], []
    for base, means in found.items():
        best = (max if base.metric in HIGHER_IS_BETTER else min)(means, key=lambda tuned: means[tuned])
        note = f"  # {edge}" if (edge := at_the_edge(base.task, best)) else ""
        chosen.append(f'    ("{base.task}", "{base.kind}"): Tuned({best.lr:g}, {best.regularisation:g}),{note}')
        rows += [[base.task, base.kind, *map("{:g}".format, (one.lr, one.regularisation, means[one]))] for one in means]
    progress.say("\n" + table(("task", "kind", "learning rate", "regularisation", "top-1 (%), NLL (bits)"), rows))
    progress.say("\nfor settings.CHOSEN:\n" + "\n".join(chosen))


def at_the_edge(task: Task, tuned: Tuned) -> str:
    """Says which of its values is the least or the greatest of three or more that were tried; empty: none."""
    tried = {
        "learning rate": (tuned.lr, {one.lr for one in settings.GRIDS[task]}),
        "regularisation": (tuned.regularisation, {one.regularisation for one in settings.GRIDS[task]}),
    }
    words = [
        f"the {word} {name} tried"
        for name, (value, values) in tried.items()
        for word, edge in (("least", min(values)), ("greatest", max(values)))
        if len(values) > 2 and value == edge
    ]
    return " and ".join(words)


def outcomes(found: Results) -> dict[Cell, dict[Tuned, float]]:
    """The mean over the seeds of everything that was tried; a base of which nothing was tried is left out."""
    tried = {
        base: {
            tuned: mean(seeds.values())
            for tuned, cell in grid(base).items()
            if (seeds := found.ends.get((cell.slug, base.metric)))
        }
        for base in BASES
    }
    return {base: means for base, means in tried.items() if means}
