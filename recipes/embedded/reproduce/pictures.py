"""Draws a figure's panels from the results; lines are means over seeds with a 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from codistill import plots
from recipes.embedded.reproduce.figures import Curves, Figure, Numbers, Sweep
from recipes.embedded.reproduce.results import Results

LABELS = {
    "top1": "validation top-1 (%)",
    "valid_loss": "validation cross-entropy (nats)",
    "train_loss": "training loss (nats)",
    "valid_nll": "validation NLL (bits per subword)",
    "train_nll": "training NLL (bits per subword, with dropout)",
    "clean_train_nll": "NLL of the training pairs (bits per subword, without dropout)",
    "ensemble_top1": "validation top-1 (%)",
    "ensemble_nll": "validation NLL (bits per subword)",
    "averaged_top1": "validation top-1 (%)",
    "averaged_nll": "validation NLL (bits per subword)",
    "again_top1": "validation top-1 (%)",
    "distance": "L2 distance from initialisation",
    "agreement": "agreement with the peer, share",
    "churn": "changed predictions (%)",
}
SPANS = {"top1": -10.0, "valid_nll": 2.0, "train_nll": 4.0}  # of curves, whose beginnings are steep


def draw(path: Path, figure: Figure, found: Results) -> bool:
    """Write the picture of a figure.

    Returns:
        Whether there was anything to draw.
    """
    own = found.of(figure.seeds)
    panels = [panel for shown in figure.panels if (panel := _panel(shown, own)) is not None]
    if panels:
        plots.draw(path, panels)
    return bool(panels)


def _panel(shown: Curves | Sweep | Numbers, found: Results) -> plots.Panel | None:
    if isinstance(shown, Numbers):
        return None
    if isinstance(shown, Curves):
        curves = _against_updates(shown, found)
        panel = plots.Panel(curves, "updates", LABELS[shown.metric], shown.title, span=SPANS.get(shown.metric))
    else:
        curves = _against_what_varies(shown, found)
        panel = plots.Panel(curves, shown.x, LABELS[shown.metric], shown.title, ticks=shown.ticks)
    return panel if curves else None


def _against_updates(shown: Curves, found: Results) -> Mapping[str, plots.Curve]:
    runs = {name: found.curves.get((cell.slug, shown.metric)) for name, cell in shown.lines.items()}
    return {name: plots.mean_of(list(seeds.values())) for name, seeds in runs.items() if seeds}


def _against_what_varies(shown: Sweep, found: Results) -> Mapping[str, plots.Curve]:
    """Points of the same seeds are a run; level lines reach from the first point to the last."""
    curves = {}
    places = [x for line in shown.lines.values() for x, _ in line]
    lines = {name: list(line) for name, line in shown.lines.items()}
    lines |= {name: [(x, cell) for x in (min(places), max(places))] for name, cell in shown.levels.items()}
    for name, line in lines.items():
        measured = [(x, seeds) for x, cell in line if (seeds := found.ends.get((cell.slug, shown.metric)))]
        common = set.intersection(*(set(seeds) for _, seeds in measured)) if measured else set()
        if common:
            curves[name] = plots.mean_of([[(x, seeds[seed]) for x, seeds in measured] for seed in sorted(common)])
    return curves
