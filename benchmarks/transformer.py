"""A real fairseq Transformer, batches for it, and pairs of codistillers that have exchanged a snapshot."""

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel, base_architecture
from torch import Tensor, nn

from codistill import CodistillConfig, Codistiller

PADDING = 1


@dataclasses.dataclass
class Size:
    """Shape of a model and its batch."""

    classes: int = 4000
    width: int = 256
    layers: int = 2
    sentences: int = 24
    words: int = 20


class Task:
    """All that fairseq's model builder asks of a task."""

    def __init__(self, classes: int) -> None:
        self.source_dictionary = self.target_dictionary = Dictionary()
        for number in range(classes - len(self.target_dictionary)):
            self.target_dictionary.add_symbol(f"w{number}")


def build(size: Size, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    args = argparse.Namespace(
        encoder_embed_dim=size.width,
        encoder_ffn_embed_dim=4 * size.width,
        encoder_layers=size.layers,
        encoder_attention_heads=4,
        decoder_layers=size.layers,
        decoder_attention_heads=4,
        share_all_embeddings=True,
        dropout=0.1,
    )
    base_architecture(args)
    return TransformerModel.build_model(args, Task(size.classes))


@dataclasses.dataclass
class Batch:
    source: Tensor
    lengths: Tensor
    previous: Tensor
    target: Tensor


def batch(size: Size) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, size.classes, (2, size.sentences, size.words), generator=generator)
    lengths = torch.full((size.sentences,), size.words)
    return Batch(tokens[0], lengths, tokens[1], tokens[1].roll(-1, dims=1))


class Training:
    """A plain loop around a model: loss, gradient, Adam; with a codistiller also the penalty."""

    def __init__(self, size: Size, seed: int) -> None:
        self.model = build(size, seed)
        self._batch = batch(size)
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def update(self, codistiller: Codistiller | None = None) -> None:
        self._optimizer.zero_grad()
        logits = self._logits(self.model)
        target = self._batch.target.reshape(-1)
        lprobs = torch.log_softmax(logits.float(), dim=-1).view(-1, logits.size(-1))
        loss, _ = label_smoothed_nll_loss(lprobs, target, 0.1, ignore_index=PADDING)
        if codistiller is not None:
            mask = self._batch.target.ne(PADDING)
            loss = loss + codistiller.alpha * codistiller.penalty(logits, self._logits, mask).loss
        (loss / target.numel()).backward()
        self._optimizer.step()

    def _logits(self, model: nn.Module) -> Tensor:
        return model(self._batch.source, self._batch.lengths, self._batch.previous)[0]


@contextlib.contextmanager
def exchanging(size: Size, interval: int = 20) -> Iterator[list[tuple[Training, Codistiller]]]:
    """Two trainings with their codistillers; the first has taken up a snapshot of the second."""
    trainings = [Training(size, seed) for seed in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        codistillers = [
            Codistiller(
                CodistillConfig(dir=f"{folder}/exchange", peer=peer, interval=interval),
                model=training.model,
                build_peer=lambda: build(size, seed=3),
                fingerprint="0" * 64,
                save_dir=Path(folder) / str(peer),
            )
            for peer, training in enumerate(trainings)
        ]
        try:
            update = 0
            while not codistillers[0].active:
                for codistiller in codistillers:
                    codistiller.begin_update(update, epoch=1)
                time.sleep(0.5)
                update += interval
            yield list(zip(trainings, codistillers, strict=True))
        finally:
            for codistiller in codistillers:
                codistiller.close()
