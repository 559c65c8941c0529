"""What the benchmarks train: models from timm and fairseq on one batch, and peers that know each other's weights."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Optional

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel, base_architecture
from timm.models import create_model
from torch import Tensor, nn

from codistill import CodistillConfig, Codistiller, fingerprint
from codistill.losses import Distilled

PADDING = 1
WAIT_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a model is called with, and what it should say: a class for each position that is not padding."""

    inputs: tuple[Tensor, ...]
    target: Tensor

    @property
    def mask(self) -> Tensor:
        return self.target.ne(PADDING) if self.target.dim() > 1 else torch.ones_like(self.target, dtype=torch.bool)

    def to(self, device: str) -> Batch:
        return Batch(tuple(each.to(device) for each in self.inputs), self.target.to(device))


@dataclasses.dataclass(frozen=True)
class Vision:
    """One of timm's networks with a batch of random images."""

    model: str = "resnet18"
    images: int = 32
    pixels: int = 64
    classes: int = 1000

    @property
    def name(self) -> str:
        return f"{self.model}, {self.images} × {self.pixels} px"

    @property
    def logits(self) -> tuple[int, ...]:
        return self.images, self.classes

    def times(self, factor: int) -> Vision:
        """The same with so many times the images."""
        return dataclasses.replace(self, images=factor * self.images)

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        size = {"img_size": self.pixels} if self.model.startswith("vit") else {}
        return create_model(self.model, num_classes=self.classes, **size)

    def batch(self, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(self.images, 3, self.pixels, self.pixels, generator=generator)
        return Batch((images,), torch.randint(self.classes, (self.images,), generator=generator))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class Task:
    """All that fairseq's model builder asks of a task."""

    def __init__(self, classes: int) -> None:
        self.source_dictionary = self.target_dictionary = Dictionary()
        for number in range(classes - len(self.target_dictionary)):
            self.target_dictionary.add_symbol(f"w{number}")


@dataclasses.dataclass(frozen=True)
class Translation:
    """fairseq's Transformer with a batch of random words."""

    classes: int = 4000
    width: int = 256
    layers: int = 2
    sentences: int = 24
    words: int = 20

    @property
    def name(self) -> str:
        return f"Transformer, {self.classes:,} words"

    @property
    def logits(self) -> tuple[int, ...]:
        return self.sentences, self.words, self.classes

    def times(self, factor: int) -> Translation:
        """The same with so many times the sentences."""
        return dataclasses.replace(self, sentences=factor * self.sentences)

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        args = argparse.Namespace(
            encoder_embed_dim=self.width,
            encoder_ffn_embed_dim=4 * self.width,
            encoder_layers=self.layers,
            encoder_attention_heads=4,
            decoder_layers=self.layers,
            decoder_attention_heads=4,
            share_all_embeddings=True,
            dropout=0.1,
        )
        base_architecture(args)
        return TransformerModel.build_model(args, Task(self.classes))

    def batch(self, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        source, previous = torch.randint(4, self.classes, (2, self.sentences, self.words), generator=generator)
        lengths = torch.full((self.sentences,), self.words)
        return Batch((source, lengths, previous), previous.roll(-1, dims=1))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=1e-4)


Workload = Vision | Translation


def logits_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Of a classifier, or of a translation model, which also says other things."""
    found = model(*inputs)
    return found[0] if isinstance(found, tuple) else found


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy with label smoothing, a mean over the positions that are not padding."""
    padding = PADDING if batch.target.dim() > 1 else -100  # none: images have no padding, and a class of that number
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), batch.target.flatten(), ignore_index=padding, label_smoothing=0.1
    )


class Training:
    """A plain loop around a model: loss, gradient, optimiser; with a codistiller also the penalty."""

    def __init__(self, workload: Workload, seed: int, device: str = "cpu") -> None:
        self.model = workload.build(seed).to(device)
        self.batch = workload.batch().to(device)
        self.optimizer = workload.optimizer(self.model)

    def update(self, codistiller: Optional[Codistiller] = None) -> Optional[Distilled]:
        """One update; what the penalty found, if there was one."""
        found, inputs = None, self.batch.inputs
        self.optimizer.zero_grad()
        if codistiller is not None:
            codistiller.predict_early(lambda peer: logits_of(peer, inputs))  # as the plug-ins do
        logits = logits_of(self.model, inputs)
        loss = loss_of(logits, self.batch)
        if codistiller is not None and codistiller.active:
            mask = self.batch.mask
            found = codistiller.penalty(logits, lambda peer: logits_of(peer, inputs), mask, inputs)
            loss = loss + codistiller.alpha * found.loss / mask.sum()
        loss.backward()
        self.optimizer.step()
        return found


@contextlib.contextmanager
def exchanging(
    workload: Workload, interval: int = 20, peers: int = 2, device: str = "cpu"
) -> Iterator[list[tuple[Training, Codistiller]]]:
    """Trainings with their codistillers; the first has taken up a snapshot of every other."""
    trainings = [Training(workload, seed, device) for seed in range(1, 1 + peers)]
    with tempfile.TemporaryDirectory() as folder:
        codistillers = [
            Codistiller(
                CodistillConfig(dir=f"{folder}/exchange", peer=peer, peers=peers, interval=interval),
                model=training.model,
                build_peer=lambda: workload.build(seed=0).to(device),
                fingerprint=fingerprint(workload.classes),
                save_dir=Path(folder) / str(peer),
            )
            for peer, training in enumerate(trainings)
        ]
        try:
            update, deadline = 0, time.monotonic() + WAIT_SECONDS
            while codistillers[0].metrics()["peers"] < peers - 1:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no snapshot of every peer within {WAIT_SECONDS:.0f} s")
                for codistiller in codistillers:
                    codistiller.begin_update(update, epoch=1)
                time.sleep(0.5)
                update += interval
            codistillers[0].begin_update(update + 1, epoch=1)  # past the boundary, whose work is not an update's
            yield list(zip(trainings, codistillers, strict=True))
        finally:
            for codistiller in codistillers:
                codistiller.close()


def side_by_side(actions: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each action in each round; who goes first rotates, since what ran before leaves its mark."""
    names = list(actions)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            actions[name]()
            if number >= 0:
                found[name].append(time.perf_counter() - began)
    return found
