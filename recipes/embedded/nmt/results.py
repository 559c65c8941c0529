"""Numbers out of what the trainings wrote: fairseq's JSON log lines, metrics.jsonl, and fairseq-generate's output."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENTRY = re.compile(r"\| (train_inner|train|valid) \| (\{.*\})\s*$")
_PARAMETERS = re.compile(r"num\. shared model params: .*\(num\. trained: ([\d,]+)\)")
_HYPOTHESIS = re.compile(r"D-(\d+)\t[^\t]*\t(.*)")
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Training:
    """What a fairseq log says.

    Args:
        update: the last update it mentions, 0 before the first.
        valid: (update, validation NLL in bits a subword), oldest first; the host's own nll_loss.
        parameters: trained parameters, 0 if the log does not say.
    """

    update: int
    valid: Sequence[tuple[int, float]]
    parameters: int

    @property
    def best(self) -> tuple[int, float]:
        """(update, NLL) of the lowest validation NLL.

        Raises:
            ValueError: no validation was logged.
        """
        return min(self.valid, key=lambda point: point[1])

    @property
    def end(self) -> float:
        """Validation NLL at the end."""
        return self.valid[-1][1]


def read_log(path: Path) -> Training:
    """Read a log written with `--log-format json`; a missing one reads as empty, a half-written line is passed over."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    update, parameters = 0, 0
    valid: dict[int, float] = {}
    for line in text.splitlines():
        found = _PARAMETERS.search(line)
        if found:
            parameters = int(found[1].replace(",", ""))
        entry = _ENTRY.search(line)
        if not entry:
            continue
        values = json.loads(entry[2])
        if entry[1] == "valid":
            valid[int(values["valid_num_updates"])] = float(values["valid_nll_loss"])
        seen = values.get("num_updates") or values.get("train_num_updates") or values.get("valid_num_updates")
        update = max(update, int(seen or 0))
    return Training(update, sorted(valid.items()), parameters)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, oldest first."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def distance(metrics: Sequence[Mapping[str, Any]]) -> float:
    """The last distance from initialisation that was measured; NaN if none was."""
    seen = [row["distance"] for row in metrics if row.get("distance") is not None]
    return float(seen[-1]) if seen else math.nan


def sent_bytes(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Bytes put on the exchange from the start to the last line; 0 where nothing was exchanged."""
    return max((int(row["sent"]) for row in metrics if row.get("sent") is not None), default=0)


def ring_all_reduce_bytes(parameters: int, workers: int) -> float:
    """Bytes one worker sends per update in a ring all_reduce of float32 gradients: 2 (n-1)/n · 4 · parameters.

    Each of n workers sends n-1 pieces of size 1/n while reducing and as many while gathering.
    """
    return 2 * (workers - 1) / workers * FLOAT_BYTES * parameters


def read_hypotheses(path: Path) -> list[str]:
    """The translations in fairseq-generate's output, in the order of the test set."""
    found = [_HYPOTHESIS.fullmatch(line) for line in path.read_text(encoding="utf-8").split("\n")]
    numbered = {int(match[1]): match[2] for match in found if match}
    return [numbered[number] for number in sorted(numbered)]


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Sacrebleu's corpus BLEU (its defaults: 13a tokens, cased) against the untouched text.

    Raises:
        ValueError: there is not one translation for each reference.
    """
    import sacrebleu

    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} translations for {len(references)} references")
    return float(sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score)
