"""The picture of `quality`: held-out quality against seconds of training, a panel a task, one line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SOLID, DASHED, DOTTED = "-", (0, (5, 2)), (0, (1.2, 1.6))
STYLES = {
    "alone": ("0.62", SOLID, "x"),
    "ddp": ("0.0", SOLID, "o"),
    "ddp-fp16": ("0.0", DASHED, "o"),
    "powersgd": ("0.0", DOTTED, "s"),
    "post-local-sgd": ("0.5", DASHED, "v"),
    "diloco": ("0.5", DOTTED, "D"),
    "checkpoint": ("#b03020", SOLID, "^"),
    "prediction": ("#b03020", DASHED, "P"),
}
WORDS = {"checkpoint": "codistill, checkpoint", "prediction": "codistill, prediction", "alone": "alone, one worker"}
SHOWN = 0.25  # of the way from the untrained model to the best one: what lies above is cut off


def draw_panels(panels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a PNG.

    Args:
        panels: by task, the details that hold its `curves`, `targets` and `unit`.
        path: where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(panels), 4.4), layout="constrained", dpi=120)
    for axes, (task, details) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _panel(axes, task, details)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Any, task: str, details: Mapping[str, Any]) -> None:
    curves: Mapping[str, Mapping[str, Sequence[float]]] = details["curves"]
    best = min(min(curve["quality"]) for curve in curves.values())
    top = best + SHOWN * (max(curve["quality"][0] for curve in curves.values()) - best)
    bottom = best - 0.08 * (top - best)
    for method, curve in curves.items():
        _line(axes, method, curve)
    wanted = sum(details["targets"]) / len(details["targets"])
    axes.axhline(wanted, color="0.75", linewidth=0.8, zorder=0)
    axes.annotate("target", (0.005, wanted), xycoords=("axes fraction", "data"), fontsize=7, color="0.45", va="bottom")
    last = max(curve["seconds"][-1] for curve in curves.values())
    axes.set(xscale="log", ylim=(bottom, top), xlim=(_first(curves, top), 1.15 * last))
    axes.set(title=task, xlabel="seconds of training (log)", ylabel=f"{details['unit']}, held-out data")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    _labels(axes, curves, bottom, top)


def _line(axes: Any, method: str, curve: Mapping[str, Sequence[float]]) -> None:
    colour, dashes, mark = STYLES[method]
    seconds, quality, spread = (curve[name][1:] for name in ("seconds", "quality", "interval"))  # from the first look
    axes.plot(
        seconds, quality, color=colour, linestyle=dashes, marker=mark, markersize=4, linewidth=1.5, markerfacecolor="w"
    )
    low, high = ([each + sign * by for each, by in zip(quality, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(seconds, low, high, color=colour, alpha=0.1, linewidth=0)


def _first(curves: Mapping[str, Mapping[str, Sequence[float]]], top: float) -> float:
    """Where the first curve comes into sight."""
    shown = [
        before
        for curve in curves.values()
        for before, quality in zip(curve["seconds"][1:], curve["quality"][2:], strict=False)
        if quality < top
    ]
    return min(shown)


def _labels(axes: Any, curves: Mapping[str, Mapping[str, Sequence[float]]], bottom: float, top: float) -> None:
    """Names in a column at the right, in the order of the ends, kept apart, each led to its own."""
    ends = sorted((curve["quality"][-1], curve["seconds"][-1], method) for method, curve in curves.items())
    gap, place = 0.058 * (top - bottom), bottom
    for quality, seconds, method in ends:
        place = max(quality, place + gap)
        colour, _, _ = STYLES[method]
        axes.annotate(
            WORDS.get(method, method),
            (seconds, quality),
            (1.04, place),
            textcoords=("axes fraction", "data"),
            fontsize=8,
            color=colour if colour != "0.62" else "0.4",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )
