"""What every training reports of its exchange and its weights, whichever framework it ran in: metrics.jsonl, bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FLOAT_BYTES = 4


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, oldest first."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def distance(metrics: Sequence[Mapping[str, Any]]) -> float:
    """The last distance from initialisation that was measured; NaN if none was."""
    seen = [row["distance"] for row in metrics if row.get("distance") is not None]
    return float(seen[-1]) if seen else math.nan


def agreement(metrics: Sequence[Mapping[str, Any]]) -> float:
    """The last agreement that was measured while peers were in use; NaN if none was."""
    seen = [row["agreement"] for row in metrics if row.get("agreement") is not None and row.get("peers")]
    return float(seen[-1]) if seen else math.nan


def together(metrics: Sequence[Mapping[str, Any]], peers: int = 1) -> float:
    """Share of the intervals at whose end at least `peers` others were in use."""
    return sum(1 for row in metrics if row.get("peers", 0) >= peers) / max(1, len(metrics))


def sent_bytes(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Bytes put on the exchange from the start to the last line; 0 where nothing was exchanged."""
    return max((int(row["sent"]) for row in metrics if row.get("sent") is not None), default=0)


def ring_all_reduce_bytes(parameters: int, workers: int) -> float:
    """Bytes one worker sends per update in a ring all_reduce of float32 gradients: 2 (n-1)/n · 4 · parameters.

    Each of n workers sends n-1 pieces of size 1/n while reducing and as many while gathering.
    """
    return 2 * (workers - 1) / workers * FLOAT_BYTES * parameters
