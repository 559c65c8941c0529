"""Task `codistill_translation`: `translation` trained on a seeded fraction of its training set.

The fraction depends on the data seed alone, so that a baseline and all peers train on the same sentence pairs whatever
their `--seed`. Validation and test sets are untouched.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy
from fairseq.data import BaseWrapperDataset, FairseqDataset
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask


@dataclass
class CodistillTranslationConfig(TranslationConfig):
    """Everything `translation` has, and which part of the training set to use."""

    codistill_data_fraction: float = field(
        default=1.0, metadata={"help": "train on this fraction of the training set, above 0 and up to 1"}
    )
    codistill_data_seed: int = field(
        default=0, metadata={"help": "which sentence pairs the fraction holds; the same for all that are compared"}
    )


@register_task("codistill_translation", dataclass=CodistillTranslationConfig)
class CodistillTranslationTask(TranslationTask):
    """Translation on part of the training data."""

    def __init__(self, cfg: Any, src_dict: Any, tgt_dict: Any) -> None:
        """Judge the fraction; a bad one ends the process with one line."""
        super().__init__(cfg, src_dict, tgt_dict)
        if not 0 < cfg.codistill_data_fraction <= 1:
            raise SystemExit(
                f"--codistill-data-fraction {cfg.codistill_data_fraction}: must be above 0 and at most 1; "
                "leave it out to train on everything"
            )

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Load `split`; of the training split keep the fraction."""
        super().load_dataset(split, epoch, combine, **kwargs)
        if split == "train" and self.cfg.codistill_data_fraction < 1:
            dataset = self.datasets[split]
            self.datasets[split] = Fraction(dataset, self.cfg.codistill_data_fraction, self.cfg.codistill_data_seed)


class Fraction(BaseWrapperDataset):
    """A dataset that offers only a seeded fraction of its items for batching; an item keeps its index.

    Args:
        dataset: the whole.
        fraction: of the items, above 0; at least one is kept.
        seed: which ones.
    """

    def __init__(self, dataset: FairseqDataset, fraction: float, seed: int) -> None:
        """Draw the items with a generator of our own."""
        super().__init__(dataset)
        count = max(1, round(fraction * len(dataset)))
        self._kept = numpy.zeros(len(dataset), dtype=bool)
        self._kept[numpy.random.default_rng(seed).permutation(len(dataset))[:count]] = True

    def ordered_indices(self) -> Any:
        """The whole's order, without the items that are left out."""
        indices = self.dataset.ordered_indices()
        return indices[self._kept[indices]]
