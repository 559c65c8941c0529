"""What a question finds: ratios measured within one run, with their spread; as lines to read, as JSON to keep.

Only ratios are ever compared with those of another run (`compare`); times and bytes beside them are for reading.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import torch

PACKAGES = ("torch", "timm", "fairseq-fixed", "torchft")


@dataclasses.dataclass(frozen=True)
class Row:
    """One ratio.

    Args:
        name: what was measured; no other row of its question has the same.
        ratio: the median.
        low: first quartile, or what else bounds the spread from below.
        high: third quartile.
        goal: what the ratio should reach.
        more: a larger ratio is better; else a smaller one is.
        details: plain JSON values beside it: times, bytes, whole curves.
    """

    name: str
    ratio: float
    low: float
    high: float
    goal: Optional[float] = None
    more: bool = False
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, name: str, ratios: Sequence[float], **more: Any) -> Row:
        """From single ratios: their median and quartiles, which of two ratios are these themselves."""
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * tuple(ratios)
        return cls(name, middle, max(low, min(ratios)), min(high, max(ratios)), **more)

    @property
    def met(self) -> Optional[bool]:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        return self.ratio >= self.goal if self.more else self.ratio <= self.goal

    @property
    def wanted(self) -> str:
        """The goal in words; empty without one."""
        return "" if self.goal is None else f"{'≥' if self.more else '≤'} {number(self.goal)}"

    @property
    def scalars(self) -> dict[str, int | float | str]:
        """The details that are single numbers or words."""
        return {name: value for name, value in self.details.items() if isinstance(value, (int, float, str))}

    @property
    def beside(self) -> str:
        """The same in one line."""
        return ", ".join(f"{name} {number(value)}" for name, value in self.scalars.items())

    def line(self) -> str:
        """For a terminal."""
        verdict = "" if self.met is None else f"  goal {self.wanted}: {'met' if self.met else 'missed'}"
        spread = "" if self.low == self.high else f" ({number(self.low)} to {number(self.high)})"
        return f"{self.name:<46} {number(self.ratio):>7}{spread}{verdict}" + (self.beside and f"  [{self.beside}]")


def number(value: float | str) -> str:
    """As many digits as can be meant."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    named = torch.cuda.get_device_name() if device == "cuda" else device
    return {"cpu": cpu, "cores": os.cpu_count(), "device": named, "packages": dict(_versions())}


def available_memory() -> int:
    """Bytes that could be had now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def path_of(folder: Path, question: str, device: str) -> Path:
    """Where the rows of a question lie below `folder`."""
    return folder / (f"{question}.json" if device == "cpu" else f"{question}-{device}.json")


def write(path: Path, question: str, rows: Sequence[Row], device: str) -> None:
    """Keep what a question found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "question": question,
        "command": f"make bench ARGS={question}"
        if device == "cpu"
        else f'make bench ARGS="{question} --device {device}"',
        "machine": machine(device),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def compare(before: Sequence[Row], now: Sequence[Row], tolerance: float) -> Iterator[tuple[bool, str]]:
    """Set a new run beside a kept one.

    Args:
        before: the kept rows.
        now: the new ones.
        tolerance: how much worse a ratio may be, as a share of the kept one.

    Yields:
        For each kept row whether it still holds, and a line that says so.
    """
    found = {row.name: row for row in now}
    for kept in before:
        row = found.get(kept.name)
        if row is None:
            yield False, f"{kept.name}: not measured now, was {number(kept.ratio)}"
            continue
        change = row.ratio / kept.ratio - 1
        worse = -change if kept.more else change
        word = "worse" if worse > tolerance else "better" if worse < -tolerance else "as before"
        ratios = f"{number(row.ratio)} now, {number(kept.ratio)} kept"
        yield worse <= tolerance, f"{kept.name}: {word}, {ratios} ({change:+.1%}, allowed {tolerance:.0%})"
