"""Writes the page: every figure with its picture, numbers and command, every claim with its verdict.

The text is reproduction.in.md, and findings.md if there is one beside the results; a line `[[NAME]]` in it becomes a
table or a list of sections. All numbers come from the CSV files that `results` reads; nothing is trained. What has not
been run is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean

from codistill.plots import half_interval
from recipes.embedded.reproduce import pictures, results, search, settings
from recipes.embedded.reproduce.claims import CLAIMS, Claim
from recipes.embedded.reproduce.figures import FIGURES, Curves, Figure, Numbers, Sweep
from recipes.embedded.reproduce.results import Results
from recipes.embedded.reproduce.trainings import Cell
from recipes.embedded.reproduce.verdicts import Judgement, Part, Verdict, judge, together

NAME = "reproduction"
TEXT = Path(__file__).with_name("reproduction.in.md")
FINDINGS = "findings.md"  # what somebody has read off the results beside it
RECIPES = Path(__file__).parents[2]
SEARCHED = RECIPES.parent / "docs" / NAME / search.NAME  # which the settings in this repository are from
COMMAND = "make reproduce"
QUICK = "**A quick run: one seed and a few updates of everything. It shows that all of it works, and nothing else.**"
DIGITS = {"top1": 1, "ensemble_top1": 1, "averaged_top1": 1, "again_top1": 1, "churn": 1, "distance": 2}


def write(out: Path, found: Results, *, quick: bool = False) -> None:
    """Write `out`/reproduction.md and the pictures in `out`/reproduction."""
    folder = out / NAME
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {figure.key for figure in FIGURES if pictures.draw(folder / f"figure-{figure.key}.png", figure, found)}
    judged = {claim.key: [judge(part, found.ends) for part in claim.parts] for claim in CLAIMS}
    verdicts = {key: together([one.verdict for one in parts]) for key, parts in judged.items()}
    findings, searched = folder / FINDINGS, folder / search.NAME
    parts = {
        "so_far": [QUICK] if quick else _so_far(found),
        "claims": _overview(verdicts, judged),
        "margins": _margins(),
        "findings": [findings.read_text("utf-8")] if findings.exists() and not quick else [],
        "chosen": _chosen(results.read(searched if searched.exists() else SEARCHED)),
        "figures": (line for figure in FIGURES for line in _figure(figure, found, judged, figure.key in drawn)),
        "parts": (line for claim in CLAIMS for line in _claim(claim, verdicts[claim.key], judged[claim.key])),
    }
    text = re.sub(r"^\[\[(\w+)\]\]$", lambda mark: "\n".join(parts[mark[1]]), TEXT.read_text("utf-8"), flags=re.M)
    (out / f"{NAME}.md").write_text(text, encoding="utf-8")


def _so_far(found: Results) -> Iterator[str]:
    wanted = {(cell.slug, seed) for figure in FIGURES for cell in figure.cells() for seed in figure.seeds}
    done = {(slug, seed) for slug, seeds in found.seconds.items() for seed in seeds}
    if missing := len(wanted - done):
        yield (
            f"**{len(wanted) - missing} of {len(wanted)} training runs are finished, and the verdicts rest on these.** "
            f"`{COMMAND}` goes on with the rest."
        )


def _margins() -> Iterator[str]:
    for metric, unit in (
        ("top1", "points of top-1"),
        ("valid_nll", "bits of NLL"),
    ):
        yield f"* {settings.MARGINS[metric]:g} {unit}"
    yield f"* {100 * settings.MARGINS['train_loss']:g} % of the training loss"


def _overview(verdicts: Mapping[str, Verdict], judged: Mapping[str, Sequence[Judgement]]) -> Iterator[str]:
    rows = []
    for claim in CLAIMS:
        link, verdict = f"[{claim.key}](#{claim.key.lower()})", verdicts[claim.key]
        rows.append([link, claim.says, _links(claim), f"**{verdict}**", _decisive(verdict, judged[claim.key])])
    yield from _table(("", "claim, in our words", "figures", "here", "the part that decides"), rows)


def _decisive(verdict: Verdict, judged: Sequence[Judgement]) -> str:
    """Of the parts with the claim's verdict the one that speaks most against the claim."""
    known = [one for one in judged if one.verdict == verdict and one.low == one.low]
    if not known:
        return ""
    one = max(known, key=lambda part: part.p)
    return f"{one.part.says}: {_amount(one.part, one.mean)} ({_span(one)}), p {_probability(one.p)}"


def _chosen(searched: Results) -> Iterator[str]:
    tried = {(base.task, base.kind): (base, means) for base, means in search.outcomes(searched).items()}
    yield "Searched (means over two seeds of their own):" if tried else "**Not searched yet:**"
    yield ""
    rows = []
    for (task, kind), tuned in settings.CHOSEN.items():
        what = f"{tuned.lr:g}, {'dropout' if task == 'nmt' else 'weight decay'} {tuned.regularisation:g}"
        if edge := search.at_the_edge(task, tuned):
            what += f" ({edge})"
        shown = []
        if (task, kind) in tried:
            base, means = tried[task, kind]
            digits = DIGITS.get(base.metric, 3)
            shown = [f"{one.lr:g}, {one.regularisation:g}: {value:.{digits}f}" for one, value in means.items()]
        rows.append([task, kind, what, "; ".join(shown)])
    yield from _table(("task", "kind", "learning rate and regularisation", "tried: top-1 (%), NLL (bits)"), rows)


def _figure(figure: Figure, found: Results, judged: Mapping[str, Sequence[Judgement]], drawn: bool) -> Iterator[str]:
    yield f"### {'Figure ' if figure.key.isdecimal() else ''}{figure.key}"
    yield ""
    yield f"{figure.title}."
    yield ""
    if drawn:
        yield f"![{figure.title}]({NAME}/figure-{figure.key}.png)"
        yield ""
    own = found.of(figure.seeds)
    rows = [row for panel in figure.panels for row in _numbers(panel, own, figure.seeds)]
    if rows:
        yield from _table(("", "", "mean ± 95 % interval", "seeds"), rows)
        yield ""
    yield f"{', '.join(_verdicts(figure, judged)) or 'No claim'}."
    took = sum(sum(own.seconds.get(cell.slug, {}).values()) for cell in figure.cells())
    yield f"`{COMMAND} FIG={figure.key}`, {took / 60:.0f} minutes of training.{_at_full_scale(figure)}"
    yield ""


def _links(claim: Claim) -> str:
    """To the headings of its figures."""
    return ", ".join(f"[{key}](#{f'figure-{key}' if key.isdecimal() else key})" for key in claim.figures)


def _at_full_scale(figure: Figure) -> str:
    found = RECIPES.glob(f"*/figure-{figure.key:0>2}.sh")
    return "".join(f" At the paper's scale: `{path.relative_to(RECIPES.parent)}`." for path in found)


def _verdicts(figure: Figure, judged: Mapping[str, Sequence[Judgement]]) -> Iterator[str]:
    """Of every claim that the figure is to show: what comes of the parts that it shows."""
    shown = figure.shown()
    for claim in CLAIMS:
        if figure.key in claim.figures:
            seen = [one for one in judged[claim.key] if one.part.compared <= shown]
            share = "" if len(seen) == len(claim.parts) else f", {len(seen)} of {len(claim.parts)} parts"
            yield f"{claim.key}{share}: **{together([one.verdict for one in seen])}**"


def _numbers(panel: Curves | Sweep | Numbers, found: Results, wanted: Sequence[int]) -> Iterator[list[str]]:
    for name, cell, metric in _entries(panel):
        seeds = found.ends.get((cell.slug, metric), {})
        missing = [seed for seed in wanted if seed not in seeds]
        digits = DIGITS.get(metric, 3)
        lost = sum(not math.isfinite(value) for value in seeds.values())
        if not seeds:
            shown = "not run"
        elif lost:
            shown = f"diverged: {lost} of {len(seeds)}"
        else:
            half = half_interval(list(seeds.values()))
            shown = f"{mean(seeds.values()):.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")
        title = "" if isinstance(panel, Numbers) or not panel.title else f"{panel.title}, "
        listed = " ".join(map(str, sorted(seeds)))
        if seeds and missing:
            listed += f" (not run: {' '.join(map(str, missing))})"
        yield [title + name, pictures.LABELS[metric], shown, listed]


def _entries(panel: Curves | Sweep | Numbers) -> Iterator[tuple[str, Cell, str]]:
    if isinstance(panel, Numbers):
        yield from panel.rows
    elif isinstance(panel, Curves):
        if panel.metric != "agreement":
            yield from ((name, cell, panel.metric) for name, cell in panel.lines.items())
    else:
        yield from ((name, cell, panel.metric) for name, cell in panel.levels.items())
        for name, line in panel.lines.items():
            yield from (
                (f"{name}, {_differs(cell, [other for _, other in line])}", cell, panel.metric) for _, cell in line
            )


def _differs(cell: Cell, line: Sequence[Cell]) -> str:
    """What is special about a cell of a line."""
    varied = [entry.name for entry in fields(Cell) if len({getattr(other, entry.name) for other in line}) > 1]
    return ", ".join(_value(name, getattr(cell, name)) for name in varied)


def _value(name: str, value: float | None) -> str:
    if name == "part":
        return "all images" if value == 1 else f"1/{value} of the images"
    return f"{name} {'0.1' if value is None else format(value, 'g')}"


def _taken(cell: Cell, tried: Sequence[Cell]) -> str:
    """Which of the cells of a sweep, least first, was best."""
    edge = {tried[0]: ", the least tried", tried[-1]: ", the greatest tried"}.get(cell, "")
    growth = f"γ = {cell.growth:g}, " if cell.growth != 1 else ""
    return growth + _differs(cell, tried) + edge


def _claim(claim: Claim, verdict: Verdict, judged: Sequence[Judgement]) -> Iterator[str]:
    yield f"### {claim.key}"
    yield ""
    yield f"**{verdict}**: {claim.says} ({'Figures' if len(claim.figures) > 1 else 'Figure'} {_links(claim)})"
    yield ""
    rows = []
    for one in judged:
        known = one.low == one.low
        says = "; ".join([one.part.says, *(f"best: {_taken(cell, tried)}" for cell, tried in one.best)])
        shown = _amount(one.part, one.mean) if one.seeds else ""
        span = _span(one) if known else ""
        rows.append(
            [says, _bound(one.part), shown, span, _probability(one.p) if known else "", f"{one.seeds}", one.verdict]
        )
    yield from _table(("part", "holds if", "mean", "95 % interval", "p", "seeds", "verdict"), rows)
    yield ""


def _span(one: Judgement) -> str:
    return f"{_amount(one.part, one.low)} to {_amount(one.part, one.high)}"


def _amount(part: Part, value: float) -> str:
    """A sum in the metric's unit; of logarithms, in percent."""
    if part.relative:
        return f"{100 * math.expm1(value):+.1f} %"
    return f"{value:.{DIGITS.get(part.terms[0].metric, 3) + 1}f}"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.0005 else "> 0.999" if p > 0.9995 else f"{p:.3f}"


def _bound(part: Part) -> str:
    if part.rule == "within":
        return f"within {_edge(part, -part.bound)} to {_edge(part, part.bound)}"
    return f"{part.rule} {_edge(part, part.bound)}"


def _edge(part: Part, bound: float) -> str:
    """In the metric's unit; of a logarithm the percent, rounded: as far below as 10 % is above are 9.1 %."""
    return f"{round(100 * math.expm1(bound), 1):g} %" if part.relative else f"{bound:g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"
