"""What a recipe ends with: a table in plain text and a picture of curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells in columns: the first one left-aligned, the others right-aligned.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError("every row needs one cell for each column")
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [_line(header, widths), "  ".join("-" * width for width in widths)]
    return "\n".join(lines + [_line(row, widths) for row in rows])


def thousands(number: float) -> str:
    """A count with its thousands apart: 1,234,567."""
    return f"{round(number):,}"


class Panel(TypedDict, total=False):
    """One plot; the keys are the arguments of `draw_curves`."""

    curves: Mapping[str, Sequence[tuple[float, float]]]
    title: str
    xlabel: str
    ylabel: str
    span: float | None
    spreads: Mapping[str, Sequence[float]]


def draw_curves(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    span: float | None = None,
    spreads: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw one line a name through its (x, y) points, and write a PNG.

    Args:
        path: the file to write.
        curves: points by name; a name without points is left out.
        title: above the picture.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        span: show at most so much above the lowest point, so that a steep beginning does not flatten the rest.
        spreads: by name, for each point, how far to shade above and below it.
    """
    draw_panels(
        path,
        [Panel(curves=curves, title=title, xlabel=xlabel, ylabel=ylabel, span=span, spreads=spreads or {})],
    )


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (7.0 * len(panels), 4.2)
    figure, places = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(places[0], panels, strict=True):
        _draw(axes, panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(axes: Any, panel: Panel) -> None:
    curves, spreads, span = panel["curves"], panel.get("spreads", {}), panel.get("span")
    for name, points in curves.items():
        if not points:
            continue
        x, y = zip(*points, strict=True)
        (line,) = axes.plot(x, y, marker="o", markersize=2.5, linewidth=1.5, label=name)
        if name in spreads:
            low = [centre - spread for centre, spread in zip(y, spreads[name], strict=True)]
            high = [centre + spread for centre, spread in zip(y, spreads[name], strict=True)]
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"])
    heights = [y for points in curves.values() for _, y in points]
    if span is not None and heights and max(heights) > min(heights) + span:
        axes.set_ylim(min(heights) - 0.05 * span, min(heights) + span)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()
