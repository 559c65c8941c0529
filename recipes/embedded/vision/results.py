"""Numbers out of what the trainings wrote: timm's summary.csv, and the size of the model."""

from __future__ import annotations

import csv
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path


@dataclass(frozen=True)
class Validation:
    """One validation: after which update, cross-entropy in nats, share of hits in percent; the training loss."""

    update: int
    loss: float
    top1: float
    train: float = math.nan


def read_summary(path: Path, updates_per_epoch: int, every: int = 1) -> list[Validation]:
    """Read the validations in a summary.csv, oldest first.

    Args:
        path: a missing file reads as empty, a half-written last line is passed over.
        updates_per_epoch: of this training.
        every: leave out what did not come after a multiple of so many updates.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = []
    for row in csv.DictReader(text.split("\n")[:-1]):
        update = (int(row["epoch"]) + 1) * updates_per_epoch
        if update % every == 0:
            loss, top1, train = (float(row[name]) for name in ("eval_loss", "eval_top1", "train_loss"))
            found.append(Validation(update, loss, top1, train))
    return found


def best(validations: Sequence[Validation]) -> float:
    """The highest top-1.

    Raises:
        ValueError: there was no validation.
    """
    return max(validation.top1 for validation in validations)


def parameters(path: Path) -> int:
    """Count the numbers in a safetensors file by its header: the trainable ones, in codistill-init.safetensors."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
