"""What finished trainings came to, as two CSV files: everything that is shown or judged follows from these.

runs.csv has a row for each model (its numbers at the end), curves.csv a row for each point of the trainings that are
drawn against updates. Where a training has several models, `Results` gives their mean.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from recipes.embedded import measures
from recipes.embedded.nmt import results as nmt
from recipes.embedded.reproduce.trainings import Arm, Cell
from recipes.embedded.steps import finished
from recipes.embedded.vision import results as vision
from recipes.embedded.vision.arms import Arm as VisionArm

EVALUATION = "evaluation.json"
LOSSES = ("train_loss", "valid_loss", "train_nll", "valid_nll")
METRICS = ("top1", *LOSSES, "distance", "together")
EVALUATED = ("clean_train_nll", "ensemble_top1", "ensemble_nll", "averaged_top1", "averaged_nll", "again_top1", "churn")
COLUMNS = ("cell", "seed", "model", "workers", "updates", "seconds", *METRICS, *EVALUATED)
POINT = ("cell", "seed", "model", "metric", "update", "value")
Curve = Sequence[tuple[int, float]]
Trained = tuple[Cell, int, Arm]
Key, Value = TypeVar("Key"), TypeVar("Value")


@dataclass
class Results:
    """Numbers of finished trainings, the mean over the models of each.

    Args:
        ends: by cell and metric, the number of every seed.
        curves: by cell and metric, the curve of every seed.
        seconds: by cell, wall time of every seed.
    """

    ends: Mapping[tuple[str, str], Mapping[int, float]] = field(default_factory=dict)
    curves: Mapping[tuple[str, str], Mapping[int, Curve]] = field(default_factory=dict)
    seconds: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def of(self, seeds: Collection[int]) -> Results:
        """These seeds alone."""

        def kept(numbers: Mapping[Key, Mapping[int, Value]]) -> dict[Key, dict[int, Value]]:
            found = {key: {seed: value for seed, value in by.items() if seed in seeds} for key, by in numbers.items()}
            return {key: by for key, by in found.items() if by}

        return Results(kept(self.ends), kept(self.curves), kept(self.seconds))


def read(folder: Path) -> Results:
    """Read both files back."""
    numbers: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    points: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    seconds: dict[str, dict[int, float]] = defaultdict(dict)
    for row in _rows(folder / "runs.csv"):
        seconds[row["cell"]][int(row["seed"])] = float(row["seconds"])
        for metric in (*METRICS, *EVALUATED):
            if row.get(metric):  # a file may be older than a metric
                numbers[row["cell"], metric][int(row["seed"])].append(float(row[metric]))
    for row in _rows(folder / "curves.csv"):
        points[row["cell"], row["metric"]][int(row["seed"])][int(row["update"])].append(float(row["value"]))
    return Results(
        {key: {seed: mean(values) for seed, values in seeds.items()} for key, seeds in numbers.items()},
        {
            key: {
                seed: [(update, mean(values)) for update, values in sorted(moments.items())]
                for seed, moments in s.items()
            }
            for key, s in points.items()
        },
        seconds,
    )


def write(folder: Path, trained: Sequence[Trained], drawn: Collection[tuple[Cell, str]]) -> None:
    """Write both files from what is finished; `drawn` are the cells and metrics whose curves are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    done = [(cell, seed, arm) for cell, seed, arm in trained if finished(arm.folder, arm.settings) is not None]
    churns = _churns(done)
    runs, points = [], []
    for cell, seed, arm in done:
        facts = finished(arm.folder, arm.settings) or {}
        judged = _evaluation(arm)
        for model in range(arm.members):
            curves = _curves(arm, model)
            row: dict[str, Any] = {
                "cell": cell.slug,
                "seed": seed,
                "model": model,
                "workers": arm.members * arm.workers,
            }
            row |= {"updates": arm.training.updates, "seconds": round(facts["seconds"], 1)}
            row |= _ends(arm, model, curves) | _judged(judged, model)
            if (cell, seed, model) in churns:
                row["churn"] = churns[cell, seed, model]
            if _diverges(curves):
                row |= {name: math.nan for name in row if name in (*METRICS, *EVALUATED)}
            runs.append({name: _text(row[name]) for name in COLUMNS if name in row})
            for metric, curve in curves.items():
                if (cell, metric) in drawn:
                    start = [cell.slug, seed, model, metric]
                    points += [dict(zip(POINT, [*start, at, _text(y)], strict=True)) for at, y in curve]
    _write(folder / "runs.csv", COLUMNS, runs)
    _write(folder / "curves.csv", POINT, points)


def diverged(arm: Arm) -> bool:
    """Whether a loss of one of the models is not finite at the end. (Its top-1 would not tell.)"""
    return any(_diverges(_curves(arm, model)) for model in range(arm.members))


def _diverges(curves: Mapping[str, Curve]) -> bool:
    return not all(math.isfinite(curves[name][-1][1]) for name in LOSSES if curves.get(name))


def _ends(arm: Arm, model: int, curves: Mapping[str, Curve]) -> dict[str, float]:
    """The last point of every curve; of the validation NLL, and of no other, the lowest."""
    ends = {name: curve[-1][1] for name, curve in curves.items() if curve and name != "agreement"}
    if "valid_nll" in curves:
        ends["valid_nll"] = min(value for _, value in curves["valid_nll"])
    ends["together"] = measures.together(_metrics(arm, model))
    return ends


def _curves(arm: Arm, model: int) -> dict[str, Curve]:
    if isinstance(arm, VisionArm):
        seen = vision.read_summary(arm.save_dir(model) / "summary.csv", arm.updates_per_epoch)
        curves: dict[str, Curve] = {
            "train_loss": [(point.update, point.train) for point in seen],
            "valid_loss": [(point.update, point.loss) for point in seen],
            "top1": [(point.update, point.top1) for point in seen],
        }
    else:
        log = nmt.read_log(arm.log(model))
        curves = {"valid_nll": log.valid, "train_nll": _thinned(log.train, [update for update, _ in log.valid])}
    moments = [update for update, _ in next(iter(curves.values()))]
    rows = _metrics(arm, model)
    curves["distance"] = _at(moments, [(row["update"], row["distance"]) for row in rows if row["distance"] is not None])
    if arm.members > 1:
        curves["agreement"] = _at(moments, [(row["update"], row["agreement"]) for row in rows if row.get("peers")])
    return curves


def _metrics(arm: Arm, model: int) -> list[dict[str, Any]]:
    return measures.read_metrics(arm.save_dir(model) / "metrics.jsonl")


def _thinned(curve: Curve, moments: Sequence[int]) -> Curve:
    """The mean of the points since the moment before, at every moment that has any."""
    found = []
    for before, moment in zip([0, *moments], moments, strict=False):
        values = [y for at, y in curve if before < at <= moment]
        found += [(moment, mean(values))] if values else []
    return found


def _at(moments: Sequence[int], curve: Curve) -> Curve:
    """At every moment the last point up to it."""
    found = []
    for moment in moments:
        past = [y for at, y in curve if at <= moment]
        found += [(moment, past[-1])] if past else []
    return found


def _evaluation(arm: Arm) -> dict[str, Any]:
    path = arm.folder / EVALUATION
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _judged(evaluation: Mapping[str, Any], model: int) -> dict[str, float]:
    if not evaluation:
        return {}
    own = evaluation["models"][model]
    return {name: own[name] for name in ("clean_train_nll", "again_top1") if name in own} | {
        f"{kind}_{metric}": evaluation[kind][metric]
        for kind in ("ensemble", "averaged")
        for metric in evaluation.get(kind, {})
    }


def _churns(done: Sequence[Trained]) -> dict[tuple[Cell, int, int], float]:
    """Of each model, the share of predictions that differ from its own of the next seed (of the last: the first)."""
    predictions: dict[tuple[Cell, int], dict[int, list[int]]] = defaultdict(dict)
    for cell, seed, arm in done:
        for model, judged in enumerate(_evaluation(arm).get("models", ())):
            predictions[cell, model][seed] = judged["predictions"]
    churns = {}
    for (cell, model), seeds in predictions.items():
        order = sorted(seeds)
        for seed, following in zip(order, [*order[1:], order[0]], strict=True):
            if following != seed:
                pairs = list(zip(seeds[seed], seeds[following], strict=True))
                churns[cell, seed, model] = 100 * sum(one != other for one, other in pairs) / len(pairs)
    return churns


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
