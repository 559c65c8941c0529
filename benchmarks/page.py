"""docs/performance.md, from the text in performance.in.md and the rows kept in docs/performance.

In the text a line `[[rows QUESTION]]` becomes the question's table with its command and machine, `[[goals]]` the table
of all goals. Pictures of what has not been measured are left out. `python -m benchmarks.page` writes the page, and
draws the pictures anew.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.__main__ import KEPT, QUESTIONS

TEXT = Path(__file__).with_name("performance.in.md")
PAGE = KEPT.with_suffix(".md")
DEVICES = ("cpu", "cuda")
MOST_COLUMNS = 6


def render() -> str:
    """The page."""
    note = (
        "<!-- Made by `python -m benchmarks.page` from benchmarks/performance.in.md and docs/performance/*.json. -->\n"
    )
    text = re.sub(r"^!\[.*\]\(performance/(\w+).*\)\n", _picture, TEXT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return note + re.sub(r"^\[\[(goals|rows)(?: (\w+))?\]\]$", _part, text, flags=re.MULTILINE)


def _picture(found: re.Match[str]) -> str:
    return found[0] if record.path_of(KEPT, found[1], "cpu").exists() else ""


def _part(found: re.Match[str]) -> str:
    kind, question = found.groups()
    return "\n".join(_goals() if kind == "goals" else _rows(question)).rstrip("\n")


def _rows(question: str) -> Iterator[str]:
    kept = [record.path_of(KEPT, question, device) for device in DEVICES]
    for path in filter(Path.exists, kept):
        whole = json.loads(path.read_text(encoding="utf-8"))
        machine, packages = whole["machine"], whole["machine"]["packages"]
        yield (
            f"`{whole['command']}` on {machine['cores']} cores ({machine['cpu']}), device {machine['device']}, "
            + ", ".join(f"{name} {version}" for name, version in packages.items())
            + "\n"
        )
        yield from _table(record.read(path))
        yield ""
    if not any(path.exists() for path in kept):
        yield "Not measured yet."


def _table(rows: Sequence[record.Row]) -> Iterator[str]:
    """The details become columns where they are few, else one column of words."""
    names = list(dict.fromkeys(name for row in rows for name in row.scalars))
    columns = names if len(names) <= MOST_COLUMNS else [""]
    goals = any(row.goal is not None for row in rows)
    yield "| | ratio | quartiles |" + (" goal |" if goals else "") + "".join(f" {name} |" for name in columns)
    yield "|---|---:|---|" + ("---|" if goals else "") + "---:|" * len(columns)
    for row in rows:
        found = row.scalars if columns == names else {"": row.beside}
        cells = [record.number(found[name]) if name in found else "" for name in columns]
        goal = [row.wanted] if goals else []
        yield f"| {' | '.join([row.name, _bold(row), _spread(row), *goal, *cells])} |"


def _goals() -> Iterator[str]:
    yield "| question | row | goal | measured | |"
    yield "|---|---|---|---:|---|"
    for question, device in itertools.product(QUESTIONS, DEVICES):
        path = record.path_of(KEPT, question, device)
        for row in record.read(path) if path.exists() else ():
            if row.goal is not None:
                distance = max(0.001, abs(row.ratio / row.goal - 1))
                verdict = "met" if row.met else f"missed by {distance:.1%}"
                where = "" if device == "cpu" else ", GPU"
                yield f"| {question}{where} | {row.name} | {row.wanted} | {record.number(row.ratio)} | {verdict} |"


def _bold(row: record.Row) -> str:
    return f"**{record.number(row.ratio)}**" if row.goal is not None else record.number(row.ratio)


def _spread(row: record.Row) -> str:
    return "" if row.low == row.high else f"{record.number(row.low)} to {record.number(row.high)}"


def main() -> None:
    for question, module in QUESTIONS.items():
        path, draw = record.path_of(KEPT, question, "cpu"), None
        if path.exists():
            draw = getattr(importlib.import_module(f"benchmarks.{module}"), "draw", None)
        if draw is not None:
            draw(record.read(path), KEPT)
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
