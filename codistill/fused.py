"""The penalty's one pass on a GPU: a Triton kernel that reads every row of logits twice and writes its gradient.

Owns the kernel alone: `codistill.losses` says what D is, which peers count and where the gradient goes, and does the
same with torch's own operators wherever `runs` says that the kernel cannot. Promises: no temporary of the logits' size;
a row that a mask or an unusable peer leaves out is not read; one launch a peer, whatever the number of classes; all is
computed in float32. The gradients of several peers are added up in the logits' own precision.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from codistill.meters import logger

try:  # it comes with torch's builds for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_COLUMNS = 4096  # of a row at a time, so that they stay in registers


def runs(own: Tensor, peers: Sequence[Tensor]) -> bool:
    """Whether the kernel can: rows without gaps, on a GPU on which a first launch has succeeded."""
    rows = all(one.device == own.device and one.dtype in _DTYPES and one.is_contiguous() for one in (own, *peers))
    return rows and own.is_cuda and own.numel() > 0 and triton is not None and _launches(own.device)


@functools.cache
def _launches(device: torch.device) -> bool:
    """Triton needs a C compiler, and a GPU that it knows."""
    logits = torch.zeros(1, 2, device=device)
    peak, losses, agreed = torch.zeros(3, 1, device=device)
    try:
        add(logits, peak, logits, peak, peak == 0, losses, agreed, None, loss="kl", temperature=1.0)
    except Exception as error:  # whatever goes wrong there, torch's operators can do it
        logger.warning("the penalty is computed without its Triton kernel, more slowly: %s", error)
        return False
    return True


def add(
    own: Tensor,
    own_peak: Tensor,
    peer: Tensor,
    peer_peak: Tensor,
    counts: Tensor,
    losses: Tensor,
    agreed: Tensor,
    pulls: Optional[Tensor],
    *,
    loss: str,
    temperature: float,
    first: bool = True,
    room: float = 1.0,
) -> None:
    """Adds what one peer contributes, where it counts.

    Args:
        own: (..., classes), contiguous like all that follow.
        own_peak: (...), the largest logit of each position.
        peer: (..., classes).
        peer_peak: (...).
        counts: (...), booleans.
        losses: (...), float32; D is added.
        agreed: (...), float32; 1 is added where the largest logits share a class.
        pulls: (..., classes); gets the direction in which D grows times `room`. It may be `peer` itself.
        loss: one of `codistill.config.LOSSES`.
        temperature: T.
        first: whether `pulls` is to be written; else it is added to.
        room: a factor for `pulls`.
    """
    classes = own.shape[-1]
    with torch.cuda.device_of(own):  # Triton launches where torch is, which may be another GPU
        _kernel[(counts.numel(),)](
            own,
            own_peak.contiguous(),
            peer,
            peer_peak.contiguous(),
            counts.contiguous().view(torch.uint8),
            losses,
            agreed,
            own if pulls is None else pulls,
            1.0 / temperature,
            room,
            CLASSES=classes,
            LOSS=loss,
            STORE=pulls is not None,
            FIRST=first,
            COLUMNS=min(_MOST_COLUMNS, triton.next_power_of_2(classes)),
        )


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _kernel(  # type: ignore[no-untyped-def]
    own,
    own_peak,
    peer,
    peer_peak,
    counts,
    losses,
    agreed,
    pulls,
    inverse,
    room,
    CLASSES: tl.constexpr,
    LOSS: tl.constexpr,
    STORE: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a position. x is our logit, y the peer's, q and p their softmaxes, as in `losses.distill`."""
    row = tl.program_id(0).to(tl.int64)
    start = row * CLASSES
    columns = tl.arange(0, COLUMNS)
    if tl.load(counts + row) != 0:
        x_peak = tl.load(own_peak + row).to(tl.float32)
        y_peak = tl.load(peer_peak + row).to(tl.float32)
        x_log = 0.0
        y_log = 0.0
        if LOSS != "mse":
            x_sum = tl.zeros([COLUMNS], tl.float32)
            y_sum = tl.zeros([COLUMNS], tl.float32)
            for at in range(0, CLASSES, COLUMNS):
                here = at + columns
                x = tl.load(own + start + here, mask=here < CLASSES, other=-float("inf")).to(tl.float32)
                y = tl.load(peer + start + here, mask=here < CLASSES, other=-float("inf")).to(tl.float32)
                x_sum += tl.exp((x - x_peak) * inverse)
                y_sum += tl.exp((y - y_peak) * inverse)
            x_log = tl.log(tl.sum(x_sum))
            y_log = tl.log(tl.sum(y_sum))
        distance = tl.zeros([COLUMNS], tl.float32)
        both = tl.zeros([COLUMNS], tl.int32)
        for at in range(0, CLASSES, COLUMNS):
            here = at + columns
            inside = here < CLASSES
            x = tl.load(own + start + here, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(peer + start + here, mask=inside, other=0.0).to(tl.float32)
            x_shifted = (x - x_peak) * inverse
            y_shifted = (y - y_peak) * inverse
            if LOSS == "mse":
                step = x - y
                term = step * step
            else:
                p = tl.exp(y_shifted - y_log)
                step = tl.exp(x_shifted - x_log) - p
                if LOSS == "kl":
                    term = p * (y_shifted - x_shifted)
                else:
                    term = -p * x_shifted
            distance += tl.where(inside, term, 0.0)
            both = tl.maximum(both, tl.where(inside & (x_shifted + y_shifted == 0.0), 1, 0))
            if STORE:
                pull = step * room
                if not FIRST:
                    pull += tl.load(pulls + start + here, mask=inside, other=0.0).to(tl.float32)
                tl.store(pulls + start + here, pull.to(pulls.dtype.element_ty), mask=inside)
        total = tl.sum(distance)
        if LOSS == "mse":
            total = total / CLASSES
        else:
            if LOSS == "kl":
                total += x_log - y_log
            else:
                total += x_log
            total = total / (inverse * inverse)
        tl.store(losses + row, tl.load(losses + row) + total)
        tl.store(agreed + row, tl.load(agreed + row) + tl.max(both).to(tl.float32))
    elif STORE and FIRST:
        for at in range(0, CLASSES, COLUMNS):
            here = at + columns
            tl.store(pulls + start + here, tl.zeros([COLUMNS], pulls.dtype.element_ty), mask=here < CLASSES)
