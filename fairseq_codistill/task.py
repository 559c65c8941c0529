"""Task `codistill_translation`: `translation` on a seeded fraction of its training set, or on each peer's own part.

Fraction and shards depend on the data seed alone, so that a baseline and all peers train on the same sentence pairs (or
share them out) whatever their `--seed`. Validation and test sets are untouched.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

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
    """Translation on part of the training data.

    Attributes:
        data_options: which part.
        shard: (i, n) where this peer trains on the i-th of n parts; criterion `codistill`, which knows, sets it.
    """

    def __init__(self, cfg: Any, src_dict: Any, tgt_dict: Any) -> None:
        """Judge the options; a bad one ends the process with one line."""
        super().__init__(cfg, src_dict, tgt_dict)
        try:
            self.data_options = DataConfig(
                cfg.codistill_data_fraction, cfg.codistill_data_seed, cfg.codistill_data_shard
            )
        except ConfigError as error:
            raise SystemExit(str(error)) from None
        self.shard: Optional[tuple[int, int]] = None

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Load `split`; of the training split keep this peer's part."""
        super().load_dataset(split, epoch, combine, **kwargs)
        data = self.data_options
        if split != self.cfg.train_subset or (data.data_fraction == 1 and not data.data_shard):
            return
        if data.data_shard and self.shard is None:
            raise SystemExit(
                "--codistill-data-shard: needs --criterion codistill, which knows the peers; add it, or leave this out"
            )
        shard = self.shard or (0, 1)
        self.datasets[split] = Fraction(self.datasets[split], data.data_fraction, data.data_seed, shard)


class Fraction(BaseWrapperDataset):
    """A dataset that offers only a seeded fraction of its items for batching; an item keeps its index.

    Args:
        dataset: the whole.
        fraction: of the items, above 0; at least one is kept.
        seed: which ones.
        shard: (i, n): the i-th of n parts of the fraction.
    """

    def __init__(self, dataset: FairseqDataset, fraction: float, seed: int, shard: tuple[int, int] = (0, 1)) -> None:
        """Draw the items once."""
        super().__init__(dataset)
        self._kept = kept_items(len(dataset), fraction, seed, shard)

    def ordered_indices(self) -> Any:
        """The whole's order, without the items that are left out."""
        indices = self.dataset.ordered_indices()
        return indices[self._kept[indices]]
