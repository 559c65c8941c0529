"""The pictures of `growth`: a picture an axis, a panel for each thing that grows, the expected line drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import drawing
from benchmarks.record import Row

LABELS = {
    "peers": "peers in the run",
    "size": "model, MB",
    "interval": "interval, updates",
    "workers": "workers of the peer (two cores: four are too many for them)",
}
LOGARITHMIC = ("size", "interval")
STYLES = {"": ("black", "o"), "float32": ("black", "o"), "bfloat16": ("0.45", "s")}


def draw(rows: Sequence[Row], folder: Path) -> None:
    pyplot = drawing.pyplot()
    for axis, label in LABELS.items():
        there = [row for row in rows if row.details["point"][0] == axis]
        names = list(dict.fromkeys(tuple(row.details["point"][1:3]) for row in there))
        if not names:
            continue
        figure, panels = pyplot.subplots(
            1, len(names), figsize=(3.7 * len(names), 3.4), layout="constrained", squeeze=False
        )
        for panel, (what, unit) in zip(panels[0], names, strict=True):
            _panel(panel, [row for row in there if row.details["point"][1] == what], unit)
            panel.set_title(f"{what}, {unit}", fontsize=9)
            _scale(panel, axis, sorted({row.details["point"][3] for row in there}))
            panel.legend(fontsize=7)
        figure.supxlabel(label, fontsize=9)
        figure.savefig(folder / f"growth-{axis}.png", dpi=120)
        pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[Row], unit: str) -> None:
    for series in dict.fromkeys(row.details["point"][4] for row in rows):
        colour, marker = STYLES[series]
        points = sorted((row.details["point"][3], row) for row in rows if row.details["point"][4] == series)
        at = [place for place, _ in points]
        expected = [row.details[f"expected {unit}"] for _, row in points]
        middle = [row.ratio * due for (_, row), due in zip(points, expected, strict=True)]
        spread = [
            [abs(row.ratio - end(row)) * due for (_, row), due in zip(points, expected, strict=True)]
            for end in (lambda row: row.low, lambda row: row.high)
        ]
        name = f", {series}" if series else ""
        panel.plot(at, expected, color=colour, linestyle="--", marker="_", linewidth=1, label=f"expected{name}")
        panel.errorbar(
            at,
            middle,
            spread,
            color=colour,
            marker=marker,
            markersize=5,
            linestyle="",
            capsize=3,
            label=f"measured{name}",
        )
    panel.grid(color="0.9")


def _scale(panel: Any, axis: str, places: Sequence[float]) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    if axis in LOGARITHMIC:
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        panel.set_ylim(bottom=0)
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.minorticks_off()
