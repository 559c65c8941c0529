"""The embedded trainings of the question `quality`: what is trained, on which batches, and how a model is judged.

Models, sizes and schedules are those of `recipes/embedded`. Both tasks keep three parts of their data apart: one to
train on, one to choose settings on (`tuning`), and one that the question reports (`held-out`). All batches are made
before a training begins.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from timm.data import create_dataset, create_transform
from timm.models import create_model
from torch import Tensor, nn

from benchmarks.workloads import PADDING, Batch, logits_of
from codistill.data import kept_items
from recipes.embedded.nmt import settings as nmt
from recipes.embedded.nmt.data import prepare
from recipes.embedded.steps import plain
from recipes.embedded.vision import settings as vision
from recipes.embedded.vision.data import write_digits

DATA = Path("data")
TUNING, HELD_OUT = "tuning", "held-out"


class Task(Protocol):
    """What one worker trains.

    Attributes:
        updates: of each worker.
        every: updates between two looks at the model.
        interval: updates between two snapshots, or two averagings.
        burn_in: updates before the first penalty.
        unit: of the quality, which is better when smaller.
        guessing: the quality of a model that knows nothing.
    """

    name: str
    updates: int
    every: int
    interval: int
    burn_in: int
    unit: str
    guessing: float

    @property
    def settings(self) -> dict[str, Any]:
        """All that a training depends on, apart from what is tuned."""

    def prepare(self) -> None:
        """Write the data below `DATA` if it is not there."""

    def build(self, seed: int, dropout: float) -> nn.Module: ...

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer: ...

    def rate(self, update: int, lr: float) -> float:
        """Learning rate of an update, from 0."""

    def batches(self, seed: int, order: int, shard: int, shards: int) -> list[Batch]:
        """One for each update: every `shards`-th batch of an order that depends on both seeds."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor: ...

    def judge(self, model: nn.Module, seed: int, part: str) -> dict[str, float]:
        """`quality` first, then what else is worth knowing."""


class OfRecipe:
    """What a task takes from its recipe's regime."""

    training: Any
    every: int

    @property
    def updates(self) -> int:
        return self.training.updates

    @property
    def interval(self) -> int:
        return self.training.interval

    @property
    def burn_in(self) -> int:
        return self.training.burn_in

    @property
    def settings(self) -> dict[str, Any]:
        return regime(self.every, self.training)


@dataclasses.dataclass(frozen=True)
class Digits(OfRecipe):
    """The narrow ResNet on 128 digits; the seed says which ones. Judged by top-1 error, in percent."""

    name: str = "digits"
    training: vision.Training = dataclasses.field(default_factory=lambda: vision.Training(updates=480))
    every: int = 40
    unit: str = "top-1 error, %"
    guessing: float = 90.0

    def prepare(self) -> None:
        (DATA / "vision").mkdir(parents=True, exist_ok=True)
        write_digits(DATA / "vision" / "digits")

    def build(self, seed: int, dropout: float) -> nn.Module:
        torch.manual_seed(seed)
        chosen = self.training
        return create_model(chosen.model, num_classes=10, channels=chosen.channels, stem_width=chosen.stem)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=self.training.weight_decay
        )

    def rate(self, update: int, lr: float) -> float:
        return lr * 0.5 * (1 + math.cos(math.pi * update / self.updates))

    def batches(self, seed: int, order: int, shard: int, shards: int) -> list[Batch]:
        images, labels = scans("train")
        chosen = numpy.flatnonzero(self._kept(seed))
        generator = numpy.random.default_rng([seed, order])
        size = self.training.batch

        def epochs() -> Iterator[numpy.ndarray]:
            while True:
                yield from generator.permutation(chosen).reshape(-1, size)

        mine = itertools.islice(epochs(), shard, None, shards)
        return [Batch((images[of],), labels[of]) for of in itertools.islice(mine, self.updates)]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(logits, batch.target)

    @torch.no_grad()
    def judge(self, model: nn.Module, seed: int, part: str) -> dict[str, float]:
        images, labels = scans("validation") if part == TUNING else scans("train")
        if part == HELD_OUT:
            left = numpy.flatnonzero(~self._kept(seed))
            images, labels = images[left], labels[left]
        model.eval()
        logits = torch.cat([model(some) for some in images.split(128)])
        wrong = (logits.argmax(-1) != labels).float().mean().item()
        return {"quality": 100 * wrong, "nll": nn.functional.cross_entropy(logits, labels).item() / math.log(2)}

    def _kept(self, seed: int) -> numpy.ndarray:
        return kept_items(vision.SCANS, self.training.images / vision.SCANS, seed)


@functools.cache
def scans(split: str) -> tuple[Tensor, Tensor]:
    """Every image of a split as timm hands it to the model without augmentation, and its class."""
    chosen = vision.Training()
    dataset = create_dataset("", root=str(DATA / "vision" / "digits"), split=split)
    dataset.transform = create_transform((3, chosen.pixels, chosen.pixels), crop_pct=chosen.crop)
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.tensor(labels)


@dataclasses.dataclass(frozen=True)
class Strings(OfRecipe):
    """The small Transformer on 1,500 pairs of interface strings. Judged by the NLL of a subword, in bits."""

    name: str = "translation"
    training: nmt.Training = dataclasses.field(default_factory=lambda: nmt.Training(updates=720))
    every: int = 80
    unit: str = "NLL, bits per subword"
    guessing: float = 10.0

    def prepare(self) -> None:
        prepare(nmt.Corpus(), DATA / "downloads", DATA / "nmt" / "corpus")

    def build(self, seed: int, dropout: float) -> nn.Module:
        torch.manual_seed(seed)
        chosen = self.training
        sizes = {
            "embed_dim": chosen.dim,
            "ffn_embed_dim": chosen.ffn,
            "layers": chosen.layers,
            "attention_heads": chosen.heads,
        }
        args = argparse.Namespace(share_all_embeddings=True, dropout=dropout)
        for side, (size, value) in itertools.product(("encoder", "decoder"), sizes.items()):
            setattr(args, f"{side}_{size}", value)
        base_architecture(args)
        return TransformerModel.build_model(args, translation())

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.0)

    def rate(self, update: int, lr: float) -> float:
        done, warmup = update + 1, self.training.warmup
        return lr * min(done / warmup, math.sqrt(warmup / done))

    def batches(self, seed: int, order: int, shard: int, shards: int) -> list[Batch]:
        task = translation()
        found = task.get_batch_iterator(
            task.dataset("train"),
            max_tokens=self.training.tokens,
            seed=seed + 1000 * order,
            disable_iterator_cache=True,
        )

        def epochs() -> Iterator[Mapping[str, Any]]:
            while True:
                yield from found.next_epoch_itr(shuffle=True)

        mine = itertools.islice(epochs(), shard, None, shards)
        return [batch_of(sample) for sample in itertools.islice(mine, self.updates)]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(
            logits.flatten(0, -2),
            batch.target.flatten(),
            ignore_index=PADDING,
            label_smoothing=self.training.label_smoothing,
        )

    @torch.no_grad()
    def judge(self, model: nn.Module, seed: int, part: str) -> dict[str, float]:
        model.eval()
        nats, positions = 0.0, 0
        for batch in sentences({TUNING: "valid", HELD_OUT: "test"}[part]):
            logits = logits_of(model, batch.inputs).flatten(0, -2)
            target = batch.target.flatten()
            nats += nn.functional.cross_entropy(logits, target, ignore_index=PADDING, reduction="sum").item()
            positions += int(batch.mask.sum())
        return {"quality": nats / positions / math.log(2)}


@functools.cache
def translation() -> TranslationTask:
    """fairseq's own task with the prepared corpus."""
    corpus = nmt.Corpus()
    folder = str(DATA / "nmt" / "corpus" / "bin")
    config = TranslationConfig(data=folder, source_lang=corpus.source, target_lang=corpus.target, train_subset="train")
    config.dataset_impl, config.required_seq_len_multiple = "mmap", 1  # fairseq-train's own parser fills these in
    task = TranslationTask.setup_task(config)
    for split in ("train", "valid", "test"):
        task.load_dataset(split)
    return task


@functools.cache
def sentences(split: str) -> Sequence[Batch]:
    task = translation()
    found = task.get_batch_iterator(task.dataset(split), max_tokens=4000, disable_iterator_cache=True)
    return [batch_of(sample) for sample in found.next_epoch_itr(shuffle=False)]


def regime(every: int, training: vision.Training | nmt.Training) -> dict[str, Any]:
    """What is not tuned; the recipes' own choices of what is tuned do not matter here."""
    return {"every": every, **{name: value for name, value in plain(training).items() if name not in ("lr", "dropout")}}


def quiet() -> None:
    """fairseq has the root logger tell everything."""
    logging.getLogger().setLevel(logging.WARNING)


def batch_of(sample: Mapping[str, Any]) -> Batch:
    given = sample["net_input"]
    return Batch((given["src_tokens"], given["src_lengths"], given["prev_output_tokens"]), sample["target"])


TASKS: dict[str, Task] = {task.name: task for task in (Digits(), Strings())}
