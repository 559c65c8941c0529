"""The command `codistill plot`, and the drawing of curves for whoever has some.

A line is the mean of its runs, with a 95 % interval where there are several; lines differ in dashes and marks, not only
in colour, so that a picture reads in grey. A run that lacks something is named in one line and left out of that panel;
when nothing is left to draw of a key, no file is written. matplotlib is loaded when a picture is drawn.
"""

from __future__ import annotations

import csv
import glob
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy

from codistill.config import ConfigError
from codistill.curves import Against, NoCurve, Point, Run, read

SHOW = ("valid_loss", "train_loss")
FORMATS = (".png", ".pdf", ".svg")
COLUMNS = ("line", "key", "x", "mean", "low", "high", "n")
CONFIDENCE = 0.95
AXES = {"updates": "updates", "epochs": "epochs", "time": "seconds"}
MEANINGS = {
    "alpha": "alpha, weight of the penalty",
    "loss": "penalty D before alpha (loss in metrics.jsonl)",
    "agreement": "agreement with the peers, share",
    "peers": "peers in use",
    "staleness": "staleness, updates",
    "gap": "gap to the peers, updates",
    "distance": "L2 distance from initialisation",
    "sent": "bytes sent",
    "received": "bytes received",
    "seconds": "seconds given to the exchange",
    "skipped": "publications skipped",
}
_LOOKS: tuple[tuple[str, Any, str], ...] = (  # colour (of unlike brightness), dashes, mark
    ("#000000", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#56b4e9", "-", "^"),
    ("#777777", ":", "D"),
    ("#009e73", "-.", "v"),
    ("#cc79a7", (0, (6, 1)), "P"),
    ("#0072b2", (0, (1, 1)), "X"),
    ("#bbbbbb", "-", "*"),
)
_LETTER_INCHES, _HANDLE_INCHES = 0.085, 0.6  # of the legend
_MARKS = 8  # on a line
_ACROSS = 3  # panels
_UPRIGHT = 8  # numbers below a panel that have room side by side


@dataclass(frozen=True)
class Curve:
    """A line.

    Attributes:
        x: where it has values.
        mean: there, over the runs.
        low: lower end of the interval there; empty for a single run.
        high: upper end.
        runs: how many.
    """

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    runs: int = 1


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        curves: lines by name; one name looks the same in all panels.
        x: what x is, with its unit.
        y: what y is, with its unit.
        title: above the panel.
        log_y: y in logarithmic steps.
        span: show at most so much above the lowest mean (negative: below the highest), so that a steep beginning does
            not flatten the rest; not with log_y.
        ticks: what stands at which x; none: what matplotlib finds fit.
    """

    curves: Mapping[str, Curve]
    x: str
    y: str
    title: str = ""
    log_y: bool = False
    span: Optional[float] = None
    ticks: Mapping[float, str] = field(default_factory=dict)


def run(
    runs: Sequence[str],
    *,
    show: str = ",".join(SHOW),
    against: Against = "updates",
    out: Optional[Path] = None,
    table: Optional[Path] = None,
    title: str = "",
    log_y: bool = False,
) -> int:
    """Read runs, and write their curves as a picture, as numbers, or both.

    Args:
        runs: RUN or NAME=RUN each: a save dir, a log, or a pattern of such; runs of one name are one line.
        show: keys, with commas between them; a panel each.
        against: what x is.
        out: the picture to write.
        table: the CSV file to write; its columns are `COLUMNS`.
        title: above the picture.
        log_y: y in logarithmic steps.

    Returns:
        The exit status: 0, or 1 when a key cannot be drawn of any run, or a file cannot be written.

    Raises:
        ConfigError: an argument that cannot work.
    """
    keys = _keys(show)
    _check_files(out, table)
    if out is not None and importlib.util.find_spec("matplotlib") is None:
        return _fail("pictures need matplotlib; try: pip install matplotlib, or --csv without --out")
    lines = _read_lines(runs)
    drawn = {key: _curves(lines, key, against) for key in keys}
    if missing := [key for key in keys if not drawn[key]]:
        return _fail(f"nothing to draw of {', '.join(missing)} against {against}; no file was written")
    try:
        if table is not None:
            _write_table(table, drawn)
        if out is not None:
            axis = AXES[against]
            panels = [Panel(curves, axis, MEANINGS.get(key, key), log_y=log_y) for key, curves in drawn.items()]
            draw(out, panels, title=title)
    except OSError as error:
        return _fail(f"{error.filename or out} could not be written: {error.strerror}")
    print(f"{', '.join(str(file) for file in (out, table) if file)}: {', '.join(keys)} against {against}")
    return 0


def mean_of(runs: Sequence[Sequence[Point]]) -> Curve:
    """The mean of runs, and a 95 % interval for it: Student's t, the runs taken as independent of each other.

    Runs have points at different x. Each is taken as straight between two of its points, and the mean is that of all
    runs, at every x where one of them has a point: from where the last one begins to where the first one ends.

    Args:
        runs: of each its (x, y), one or more, x increasing, y finite.

    Returns:
        The curve; without x when there is none that all runs cover.
    """
    if len(runs) == 1:
        x, y = zip(*runs[0], strict=True)
        return Curve(x, y)
    begin, end = max(points[0][0] for points in runs), min(points[-1][0] for points in runs)
    common = sorted({x for points in runs for x, _ in points if begin <= x <= end})
    values = numpy.array([numpy.interp(common, *numpy.array(points).T) for points in runs])
    mean = values.mean(axis=0)
    half = student_t(len(runs) - 1) * values.std(axis=0, ddof=1) / math.sqrt(len(runs))
    return Curve(common, mean.tolist(), (mean - half).tolist(), (mean + half).tolist(), len(runs))


def half_interval(values: Sequence[float]) -> float:
    """How far the 95 % interval of a mean reaches to either side (Student's t); NaN unless two or more, all finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student_t(freedom: int) -> float:
    """How many standard errors the 95 % interval reaches to either side.

    Found by halving: the share within is known in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _share_within(angle: float, freedom: int) -> float:
    """Probability that |t| is at most sqrt(freedom) tan(angle)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for factor in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (factor - 1) / factor * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def draw(path: Path, panels: Sequence[Panel], *, title: str = "") -> None:
    """Draw panels beside each other, with one legend for all, and write a picture; its suffix says of which format.

    Args:
        path: the file; its folder is made.
        panels: at least one.
        title: above all of them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    across, down = min(_ACROSS, len(panels)), math.ceil(len(panels) / _ACROSS)
    figure = Figure(figsize=(5.0 * across, 3.6 * down + 0.5), layout="constrained", dpi=120)
    places = figure.subplots(down, across, squeeze=False).flatten()
    for place, panel in zip(places, panels, strict=False):
        _draw_panel(place, panel, names)
    for unused in places[len(panels) :]:
        unused.set_axis_off()
    handles = [_handle(number) for number in range(len(names))]
    labels = [_label(name, panels) for name in names]
    room = int(figure.get_figwidth() / (_HANDLE_INCHES + _LETTER_INCHES * max(map(len, labels))))
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(room, len(names))), frameon=False)
    figure.suptitle(_literal(title))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(axes: Any, panel: Panel, names: Sequence[str]) -> None:
    for name, curve in panel.curves.items():
        number = names.index(name)
        step = max(1, math.ceil(len(curve.x) / _MARKS))
        look = _look(number)
        axes.plot(curve.x, curve.mean, **look, markevery=(number % step, step))
        if len(curve.low):
            axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
    axes.set(title=_literal(panel.title), xlabel=_literal(panel.x), ylabel=_literal(panel.y))
    heights = [y for curve in panel.curves.values() for y in curve.mean]
    if panel.log_y and any(y > 0 for y in heights):
        axes.set_yscale("log")
    elif panel.span is not None and heights and max(heights) - min(heights) > abs(panel.span):
        edge = min(heights) if panel.span > 0 else max(heights)
        axes.set_ylim(sorted((edge - 0.05 * panel.span, edge + panel.span)))
    if panel.ticks:
        crowded = len(panel.ticks) > _UPRIGHT
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()), rotation=45 if crowded else 0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _look(number: int) -> dict[str, Any]:
    colour, dashes, mark = _LOOKS[number % len(_LOOKS)]
    return {"color": colour, "linestyle": dashes, "marker": mark, "markersize": 4.5, "linewidth": 1.5}


def _handle(number: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **_look(number))


def _label(name: str, panels: Sequence[Panel]) -> str:
    runs = sorted({panel.curves[name].runs for panel in panels if name in panel.curves})
    if runs == [1]:
        return _literal(name)
    several = f"{runs[-1]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    return _literal(f"{name} (mean of {several}, 95 % interval)")


def _literal(text: str) -> str:
    """For matplotlib, which takes what is between two $ for a formula."""
    return text.replace("$", r"\$")


def _keys(show: str) -> list[str]:
    keys = list(dict.fromkeys(key.strip() for key in show.split(",")))
    if "" in keys:
        raise ConfigError(f"--show {show!r}: must be keys with commas between them, such as {','.join(SHOW)}")
    return keys


def _check_files(out: Optional[Path], table: Optional[Path]) -> None:
    if out is None and table is None:
        raise ConfigError("--out: give a file for the picture, or --csv a file for the numbers, or both")
    if out is not None and out.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {str(out)!r}: must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def _read_lines(arguments: Sequence[str]) -> dict[str, list[Run]]:
    """The runs by line. What is not a run is named and left out."""
    named = [_named(argument) for argument in arguments]
    short = [path.resolve().name for name, paths in named if not name for path in paths]
    lines: dict[str, dict[Path, Run]] = {}
    for name, paths in named:
        for path in paths:
            own = path.resolve().name
            line = name or (own if short.count(own) == 1 else str(path))
            try:
                lines.setdefault(line, {})[path.resolve()] = read(path)
            except NoCurve as error:
                _say(f"{error}; left out")
    return {line: list(runs.values()) for line, runs in lines.items()}


def _named(argument: str) -> tuple[str, list[Path]]:
    """The line's name, if it has one, and the paths that are there."""
    name, mark, pattern = argument.partition("=")
    if not mark or "/" in name or os.path.exists(argument):
        name, pattern = "", argument
    elif not name or not pattern:
        raise ConfigError(f"{argument!r}: must be RUN or NAME=RUN, with the save dir or log of a run, or a pattern")
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ConfigError(f"{argument!r}: there is no such folder or file; give the save dir or log of a run")
    return name, [Path(path) for path in found]


def _curves(lines: Mapping[str, Sequence[Run]], key: str, against: Against) -> dict[str, Curve]:
    """A curve for each line that has one."""
    curves = {}
    for name, runs in lines.items():
        found = [points for run in runs if (points := _points(run, key, against))]
        if not found:
            continue
        curve = mean_of(found)
        longest = max(points[-1][0] for points in found)
        if not curve.x:
            _say(f"{name}: no {AXES[against]} at which all its runs have {key}; left out")
            continue
        if curve.x[-1] < 0.9 * longest:
            _say(f"{name}: {key} ends at {curve.x[-1]:g} {AXES[against]} with the shortest run, not at {longest:g}")
        curves[name] = curve
    return curves


def _points(run: Run, key: str, against: Against) -> list[Point]:
    """The finite points of a run; what it lacks is said."""
    try:
        points = run.curve(key, against)
    except NoCurve as error:
        _say(f"{error}; left out")
        return []
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) < len(points):
        _say(
            f"{run.path}: {key} is not finite at {len(points) - len(finite)} of {len(points)} points; they are left out"
        )
    return finite


def _write_table(path: Path, drawn: Mapping[str, Mapping[str, Curve]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for key, curves in drawn.items():
            for name, curve in curves.items():
                empty = [""] * len(curve.x)
                rows = zip(curve.x, curve.mean, curve.low or empty, curve.high or empty, strict=True)
                writer.writerows([name, key, *row, curve.runs] for row in rows)


def _say(text: str) -> None:
    print(f"codistill: {text}", file=sys.stderr)


def _fail(text: str) -> int:
    _say(text)
    return 1
