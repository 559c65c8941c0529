"""Numbers out of what the trainings wrote: fairseq's JSON log lines and fairseq-generate's output.

What is not fairseq's own comes from `recipes.embedded.measures` and is named here too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.embedded.measures import FLOAT_BYTES, distance, read_metrics, ring_all_reduce_bytes, sent_bytes

__all__ = [
    "FLOAT_BYTES",
    "Training",
    "bleu",
    "distance",
    "read_hypotheses",
    "read_log",
    "read_metrics",
    "ring_all_reduce_bytes",
    "sent_bytes",
]

_ENTRY = re.compile(r"\| (train_inner|train|valid) \| (\{.*\})\s*$")
_PARAMETERS = re.compile(r"num\. shared model params: .*\(num\. trained: ([\d,]+)\)")
_HYPOTHESIS = re.compile(r"D-(\d+)\t[^\t]*\t(.*)")


@dataclass(frozen=True)
class Training:
    """What a fairseq log says.

    Args:
        update: the last update it mentions, 0 before the first.
        valid: (update, validation NLL in bits a subword), oldest first; the host's own nll_loss.
        parameters: trained parameters, 0 if the log does not say.
        train: (update, training NLL in bits a subword) of the updates since the point before, with dropout.
    """

    update: int
    valid: Sequence[tuple[int, float]]
    parameters: int
    train: Sequence[tuple[int, float]] = field(default_factory=list)

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
    train: dict[int, float] = {}
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
        elif entry[1] == "train_inner" and "nll_loss" in values:
            train[int(values["num_updates"])] = float(values["nll_loss"])
        seen = values.get("num_updates") or values.get("train_num_updates") or values.get("valid_num_updates")
        update = max(update, int(seen or 0))
    return Training(update, sorted(valid.items()), parameters, sorted(train.items()))


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
