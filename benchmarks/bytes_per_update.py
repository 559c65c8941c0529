"""How many bytes does a worker send per update?

Computed for large models: how many times as many bytes all_reduce sends. For small ones counted on the loopback
interface of a network namespace, headers and polls included: how many times as many as computed.
"""

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
from benchmarks.record import Row
from benchmarks.workloads import Task
from codistill.exchange.prediction.wire import payload_bytes
from codistill.exchange.snapshot import HostBuffer

INTERVALS = (10, 100, 1000)
TOPK = (8, 32, 128)
TOLERANCE = 0.05


@dataclasses.dataclass
class Traffic:
    """What one of two workers sends: its gradient, its snapshot by dtype, the logits of an update.

    A ring all_reduce of n workers sends 2 (n - 1) / n gradients: one for two.
    """

    gradient: int
    snapshot: dict[str, int]
    logits: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, logits: tuple[int, ...]) -> Traffic:
        gradient = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        state = model.state_dict()
        return cls(gradient, {dtype: HostBuffer(state, dtype).nbytes for dtype in ("float32", "bfloat16")}, logits)

    def rows(self) -> Iterator[tuple[str, float]]:
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


def measure(device: str) -> Iterator[Row]:
    torch.set_num_threads(2)
    for name, build in {"ResNet-50": resnet50, "Transformer-big": transformer_big}.items():
        traffic = build()
        for kind, size in traffic.rows():
            ratio = traffic.gradient / size
            details = {"bytes": round(size), "all_reduce": traffic.gradient}
            yield Row(f"{name}: {kind}", ratio, ratio, ratio, more=True, details=details)
        gc.collect()
    try:
        for name, kind, computed, measured in alone("benchmarks.bytes_measured"):
            ratio = measured / computed
            details = {"computed": round(computed), "measured": round(measured)}
            yield Row(f"{name}: {kind}, measured", ratio, ratio, ratio, details=details)
    except Unavailable as error:
        print(f"  not measured: {error}")
