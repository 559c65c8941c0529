"""Throughput against the links' speed, a panel a workload, a line a method; dotted what its bytes and time foretell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import drawing
from benchmarks.record import Row

STYLES = {
    "DDP": ("0.0", "o"),
    "DDP, float16": ("0.35", "s"),
    "PowerSGD, rank 2": ("0.0", "x"),
    "post-local SGD": ("0.5", "^"),
    "DiLoCo": ("0.5", "v"),
    "prediction": ("0.35", "D"),
    "checkpoint": ("tab:red", "*"),
    "checkpoint, bfloat16": ("tab:red", "+"),
}
UNTHROTTLED = 10_000.0  # where it stands on the axis
ALONE = "alone"


def curves(rows: Sequence[Row], path: Path) -> None:
    """Draw them into a PNG file."""
    pyplot = drawing.pyplot()
    points = [row.details["curve"] for row in rows if "curve" in row.details]
    workloads = list(dict.fromkeys(point["workload"] for point in points))
    if not workloads:
        return
    size = (4.2 * len(workloads), 4.2)
    figure, panels = pyplot.subplots(1, len(workloads), figsize=size, layout="constrained", squeeze=False)
    for axis, workload in zip(panels[0], workloads, strict=True):
        _panel(axis, [point for point in points if point["workload"] == workload])
        axis.set_title(workload, fontsize=9)
    panels[0][0].set_ylabel("updates per second, each of two workers")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Any, points: Sequence[dict[str, Any]]) -> None:
    for method, (colour, marker) in STYLES.items():
        own = sorted((point for point in points if point["method"] == method), key=_place)
        if not own:
            continue
        speeds = [_place(point) for point in own]
        style = {"color": colour, "marker": marker, "markersize": 9 if marker == "*" else 5}
        axis.plot(speeds, [point["measured"] for point in own], label=method, **style)
        axis.plot(speeds, [point["predicted"] for point in own], color=colour, linestyle=":", linewidth=1)
    for point in points:
        if point["method"] == ALONE:
            axis.axhline(point["measured"], color="0.7", linewidth=0.8)
            axis.annotate("alone", (32, point["measured"]), fontsize=7, va="bottom", color="0.4")
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = sorted({_place(point) for point in points})
    axis.set_xticks(ticks, ["no limit" if tick == UNTHROTTLED else f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("Mbit/s of each worker's link, each way")
    axis.grid(color="0.9")


def _place(point: dict[str, Any]) -> float:
    return UNTHROTTLED if point["mbit"] is None else float(point["mbit"])
