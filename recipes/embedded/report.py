"""What a recipe ends with: a table in plain text and a picture of curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


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


def draw_curves(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    span: float | None = None,
) -> None:
    """Draw one line a name through its (x, y) points, and write a PNG.

    Args:
        path: the file to write.
        curves: points by name; a name without points is left out.
        title: above the picture.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        span: show at most so much above the lowest point, so that a steep beginning does not flatten the rest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.2), layout="constrained")
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=2.5, linewidth=1.5, label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    heights = [y for points in curves.values() for _, y in points]
    if span is not None and heights and max(heights) > min(heights) + span:
        axes.set_ylim(min(heights) - 0.05 * span, min(heights) + span)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()
