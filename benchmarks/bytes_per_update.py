"""How many bytes does a worker send per update? (computed for large models; for small ones measured beside it)"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Iterator

import torch
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import transformer_vaswani_wmt_en_de_big
from timm.models import create_model
from torch import nn

from benchmarks.loopback import Unavailable, alone
from benchmarks.transformer import Task
from codistill.exchange.prediction.wire import payload_bytes
from codistill.exchange.snapshot import HostBuffer

INTERVALS = (10, 100, 1000)
TOPK = (8, 32, 128)


@dataclasses.dataclass
class Traffic:
    """What one of two workers sends: its gradient, its snapshot by dtype, the logits of an update."""

    gradient: int
    snapshot: dict[str, int]
    logits: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, logits: tuple[int, ...]) -> Traffic:
        gradient = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        state = model.state_dict()
        return cls(gradient, {dtype: HostBuffer(state, dtype).nbytes for dtype in ("float32", "bfloat16")}, logits)

    def rows(self) -> Iterator[tuple[str, float]]:
        # A ring of n workers sends 2 (n - 1) / n gradients: one for two.
        yield "ring all_reduce, 2 workers, float32", self.gradient
        for interval in INTERVALS:
            for dtype, size in self.snapshot.items():
                yield f"checkpoint, interval {interval}, {dtype}", size / interval
        for dtype in ("float32", "bfloat16"):
            yield f"prediction, {dtype}", payload_bytes(self.logits, dtype, 0)
        for topk in TOPK:
            yield f"prediction, bfloat16, top {topk}", payload_bytes(self.logits, "bfloat16", topk)


def resnet50() -> Traffic:
    return Traffic.of(create_model("resnet50"), (32, 1000))


def transformer_big() -> Traffic:
    args = argparse.Namespace(share_all_embeddings=True)
    transformer_vaswani_wmt_en_de_big(args)
    model = TransformerModel.build_model(args, Task(32768))
    return Traffic.of(model, (3584, 32768))


def measure() -> Iterator[str]:
    torch.set_num_threads(2)
    yield "computed, bytes a worker sends per update (in brackets: all_reduce sends so many times as much)"
    columns = {
        "ResNet-50, 32 images": resnet50,
        "Transformer-big, 3,584 tokens, 32,768 words": transformer_big,
    }
    found = []
    for build in columns.values():
        found.append(list(build().rows()))
        gc.collect()
    gradients = [rows[0][1] for rows in found]
    yield f"{'':38}" + "".join(f"{name:>45}" for name in columns)
    for row in zip(*found, strict=True):
        cells = [f"{size:,.0f} ({gradient / size:,.1f})" for (_, size), gradient in zip(row, gradients, strict=True)]
        yield f"{row[0][0]:38}" + "".join(f"{cell:>45}" for cell in cells)
    yield "measured on the loopback interface of a network namespace, two workers, bytes a worker sends per update"
    try:
        for model, kind, computed, measured in alone("benchmarks.bytes_measured"):
            yield (
                f"{model:24}{kind:34}{computed:>14,.0f} computed {measured:>14,.0f} measured, "
                f"{measured / computed:.3f} times as much"
            )
    except Unavailable as error:
        yield f"not measured: {error}"
