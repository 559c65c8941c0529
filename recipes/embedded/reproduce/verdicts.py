"""Whether a claim holds here: differences between trainings of the same seeds, judged by one rule.

Every part of a claim is a weighted sum of measured values, taken seed by seed; its mean has a 95 % interval (Student's
t, the seeds taken as independent, or see `SHARED`). A part *holds* when the whole interval lies where the part says,
*does not hold here* when the whole interval lies elsewhere, and is *undecided* otherwise, with a single seed too. A
claim holds when all its parts do, and does not when one of them does not. p is one-sided, against the part: it holds
when p is below 0.025. Nothing is corrected for the number of claims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Literal

from scipy import stats

from codistill.plots import student_t
from recipes.embedded.reproduce.settings import MARGINS
from recipes.embedded.reproduce.trainings import Cell

Verdict = Literal["holds", "does not hold here", "undecided", "not run"]
Rule = Literal["above", "below", "within"]
Values = Mapping[int, float]  # by seed
HIGHER_IS_BETTER = ("top1", "ensemble_top1", "averaged_top1", "again_top1", "agreement")
RELATIVE = ("train_loss",)  # compared as shares
# Each seed takes part in two of these values, of which two that share a seed correlate by at most a half (Hoeffding
# 1948, The Annals of Mathematical Statistics 19:293, of symmetric functions of independent variables).
SHARED = ("churn",)


@dataclass(frozen=True)
class Term:
    """A weight and what it weighs: a cell's metric, or that of the cell that is best on average, of several."""

    weight: float
    metric: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Part:
    """What a claim says of one sum of terms.

    Args:
        says: in words.
        terms: summed seed by seed.
        rule: where the sum lies: above `bound`, below it, or between -bound and bound.
        bound: in the metric's unit; a logarithm where the sum is `relative`.
    """

    says: str
    terms: tuple[Term, ...]
    rule: Rule
    bound: float = 0.0

    @property
    def relative(self) -> bool:
        """Whether logarithms of the values are summed."""
        return self.terms[0].metric in RELATIVE

    @property
    def shared(self) -> bool:
        """Whether each seed takes part in the sums of two."""
        return self.terms[0].metric in SHARED

    @property
    def compared(self) -> set[tuple[Cell, str]]:
        """Cells and metrics that it is about."""
        return {(cell, term.metric) for term in self.terms for cell in term.cells}


@dataclass(frozen=True)
class Judgement:
    """A part and what became of it; numbers are NaN where nothing can be said, as after a training that diverged.

    `best` has, of every term with several cells, the one that was taken, and those.
    """

    part: Part
    verdict: Verdict
    seeds: int = 0
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    best: tuple[tuple[Cell, tuple[Cell, ...]], ...] = ()


def better(says: str, metric: str, one: Cell, other: Cell) -> Part:
    """`one` has the better mean."""
    return Part(says, _difference(metric, one, other), "above" if metric in HIGHER_IS_BETTER else "below")


def above(says: str, metric: str, one: Cell, other: Cell) -> Part:
    """`one` has the larger mean."""
    return Part(says, _difference(metric, one, other), "above")


def below(says: str, metric: str, one: Cell, other: Cell) -> Part:
    """`one` has the smaller mean."""
    return Part(says, _difference(metric, one, other), "below")


def not_worse(says: str, metric: str, one: Cell, other: Cell, *, against: str | None = None) -> Part:
    """`one` is worse by less than the metric's margin, or better; `against` is the other's metric, if not the same."""
    terms, margin = (Term(1.0, metric, (one,)), Term(-1.0, against or metric, (other,))), _margin(metric)
    return Part(says, terms, "above", -margin) if metric in HIGHER_IS_BETTER else Part(says, terms, "below", margin)


def alike(says: str, metric: str, one: Cell, other: Cell) -> Part:
    """The two differ by less than the metric's margin, either way."""
    return Part(says, _difference(metric, one, other), "within", _margin(metric))


def judge(part: Part, measured: Mapping[tuple[str, str], Values]) -> Judgement:
    """Judge a part.

    Args:
        part: what is said.
        measured: by a cell's slug and a metric, the value of every seed.
    """
    chosen = [(term, best(term, measured)) for term in part.terms]
    found = [(term, cell, measured[cell.slug, term.metric]) for term, cell in chosen if cell is not None]
    seeds = set.intersection(*(set(values) for _, _, values in found)) if len(found) == len(chosen) else set()
    if not seeds:
        return Judgement(part, "not run")
    scale = _logarithm if part.relative else float
    sums = [sum(term.weight * scale(values[seed]) for term, _, values in found) for seed in sorted(seeds)]
    taken = tuple((cell, term.cells) for term, cell, _ in found if len(term.cells) > 1)
    return replace(decide(part, sums), best=taken)


def decide(part: Part, sums: Sequence[float]) -> Judgement:
    """Judge a part by its sum from each of one or more seeds."""
    centre = mean(sums)
    if len(sums) < (3 if part.shared else 2) or not math.isfinite(centre):
        return Judgement(part, "undecided", len(sums), centre)
    error, freedom = stdev(sums) / math.sqrt(len(sums)) * _widening(part, len(sums)), len(sums) - 1
    half = student_t(freedom) * error
    low, high, bound = centre - half, centre + half, part.bound
    over, under = (
        (lambda edge: _tail(centre - edge, error, freedom)),
        (lambda edge: _tail(edge - centre, error, freedom)),
    )
    inside, outside, p = {
        "above": (low > bound, high < bound, over(bound)),
        "below": (high < bound, low > bound, under(bound)),
        "within": (-bound < low and high < bound, low > bound or high < -bound, max(over(-bound), under(bound))),
    }[part.rule]
    verdict: Verdict = "holds" if inside else "does not hold here" if outside else "undecided"
    return Judgement(part, verdict, len(sums), centre, low, high, p)


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of a claim of such parts."""
    for word in ("does not hold here", "undecided", "not run"):
        if word in verdicts:
            return "undecided" if word == "not run" and set(verdicts) != {"not run"} else word
    return "holds"


def _widening(part: Part, count: int) -> float:
    """How much larger than of independent sums the standard error can be.

    The variance of the mean doubles when neighbours in the circle of seeds correlate by a half, and the sums' own is
    then found too small by 1/(count - 1).
    """
    return math.sqrt(2 / (1 - 1 / (count - 1))) if part.shared else 1.0


def _margin(metric: str) -> float:
    return math.log1p(MARGINS[metric]) if metric in RELATIVE else MARGINS[metric]


def _logarithm(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _difference(metric: str, one: Cell, other: Cell) -> tuple[Term, Term]:
    return Term(1.0, metric, (one,)), Term(-1.0, metric, (other,))


def best(term: Term, measured: Mapping[tuple[str, str], Values]) -> Cell | None:
    """Of the term's cells the one that is best on average, over the seeds that all have; None: not all were run."""
    found = {cell: values for cell in term.cells if (values := measured.get((cell.slug, term.metric)))}
    if len(found) < len(term.cells):
        return None
    common = set.intersection(*(set(values) for values in found.values()))
    sign = 1 if term.metric in HIGHER_IS_BETTER else -1

    def merit(cell: Cell) -> float:
        average = sign * mean(found[cell][seed] for seed in common) if common else math.nan
        return average if math.isfinite(average) else -math.inf

    return max(found, key=merit)


def _tail(distance: float, error: float, freedom: int) -> float:
    """Probability of such a mean or a more distant one, were the true distance 0."""
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / error, freedom))
