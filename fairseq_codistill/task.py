"""Task `codistill_translation`: `translation` trained on a seeded fraction of its training set.

The fraction depends on the data seed alone, so that a baseline and all peers train on the same sentence pairs whatever
their `--seed`. Validation and test sets are untouched.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from fairseq.data import BaseWrapperDataset, FairseqDataset
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from codistill import ConfigError, DataConfig, kept_items
from fairseq_codistill.options import option_fields

_DataOptions = dataclasses.make_dataclass("_DataOptions", option_fields(DataConfig), bases=(TranslationConfig,))


@dataclass
class CodistillTranslationConfig(_DataOptions):  # type: ignore[misc, valid-type]
    """Everything `translation` has, and which part of the training set to use."""


@register_task("codistill_translation", dataclass=CodistillTranslationConfig)
class CodistillTranslationTask(TranslationTask):
    """Translation on part of the training data."""

    def __init__(self, cfg: Any, src_dict: Any, tgt_dict: Any) -> None:
        """Judge the fraction; a bad one ends the process with one line."""
        super().__init__(cfg, src_dict, tgt_dict)
        try:
            DataConfig(cfg.codistill_data_fraction, cfg.codistill_data_seed)
        except ConfigError as error:
            raise SystemExit(str(error)) from None

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
        """Draw the items once."""
        super().__init__(dataset)
        self._kept = kept_items(len(dataset), fraction, seed)

    def ordered_indices(self) -> Any:
        """The whole's order, without the items that are left out."""
        indices = self.dataset.ordered_indices()
        return indices[self._kept[indices]]
