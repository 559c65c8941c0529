"""Logits as bytes, for exchange by prediction, and what tells whether two peers predict for the same batch.

Owns the layout of a payload: all logits of each position, or its K largest with the mass of the rest. A payload's size
follows from shape, dtype and K alone, so a reader knows it beforehand. What a peer sends is not trusted: the wrong
number of bytes is a ValueError, a class that does not exist, or comes twice, makes its position NaN, and
`losses.distill` leaves out a peer with such logits. Logits of our own that are not finite arrive as not finite.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codistill.exchange.snapshot import WIRE_DTYPES

_BLOCK = 2**22  # logits worked on at a time, so that wide copies of them stay small
_EXACT_BYTES = 2**20
_ROW_BYTES = 2**15


def payload_bytes(shape: Sequence[int], dtype: str, topk: int) -> int:
    """Size of what `encode` makes of logits of `shape`."""
    return _Layout.of(shape, dtype, topk).nbytes


def encode(own: Tensor, dtype: str, topk: int) -> Tensor:
    """Own logits as bytes.

    The logits arrive exactly when `own` has the wire's dtype, or the wire is float32. Otherwise they are rounded as
    distances from their position's largest logit, which travels in float32: the likely classes lose least, and float16
    does not overflow.

    Args:
        own: (..., classes) logits of any floating dtype, device and layout.
        dtype: Of the logits on the wire, a key of `WIRE_DTYPES`.
        topk: Logits of each position to send, the largest; 0, or no fewer than there are classes: all.

    Returns:
        One dimension of uint8 on the CPU; may share own's memory.
    """
    layout = _Layout.of(own.shape, dtype, topk)
    rows = own.detach().reshape(-1, own.shape[-1])
    if dtype == "float32" and not layout.sparse:
        return rows.float().contiguous().view(-1).view(torch.uint8).cpu()
    payload = torch.empty(layout.nbytes, dtype=torch.uint8, device=own.device)
    parts = layout.parts(payload)
    for block in layout.blocks():
        _encode_block(rows[block], layout, [part[block] for part in parts])
    return payload.cpu()


def decode(payload: Tensor, like: Tensor, dtype: str, topk: int) -> Tensor:
    """A peer's logits, as `encode` sent them.

    With `topk`, the mass that the peer's softmax gives to the other classes is spread evenly over them. At temperature
    1 the softmax is right at the K classes, and so is the sum of the rest; another temperature acts on that
    reconstruction. With m the mass of the rest, r the peer's true distribution within it, u the even one and s our own,
    KL(peer ‖ own) then comes out smaller by exactly m · (KL(r ‖ s) − KL(u ‖ s)).

    Args:
        payload: One dimension of uint8 on the CPU, from the peer.
        like: Own logits of the same batch.
        dtype: As in `encode`.
        topk: As in `encode`.

    Returns:
        Logits of like's shape on its device, float32 whatever like's dtype: `losses.distill` computes in it anyway, and
        rounding once more would undo what `encode` saved. May share the payload's memory.

    Raises:
        ValueError: The payload does not have the size that shape, dtype and topk ask for.
    """
    layout = _Layout.of(like.shape, dtype, topk)
    if payload.shape != (layout.nbytes,) or payload.dtype != torch.uint8:
        raise ValueError(
            f"payload has shape {tuple(payload.shape)} and {payload.dtype}, not ({layout.nbytes},) and torch.uint8"
        )
    parts = layout.parts(payload.to(like.device))
    logits = _decode_sparse(layout, parts) if layout.sparse else _decode_dense(parts)
    return logits.view(like.shape)


@dataclass(frozen=True)
class _Layout:
    """Where what lies in a payload: origins (16-bit dtypes), rests and classes (topk), logits; each for all positions.

    Attributes:
        positions: Number of distributions.
        classes: Logits of each.
        sent: Logits sent of each.
        dtype: Of those.
    """

    positions: int
    classes: int
    sent: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: Sequence[int], dtype: str, topk: int) -> _Layout:
        classes = shape[-1]
        return cls(math.prod(shape[:-1]), classes, min(topk, classes) or classes, WIRE_DTYPES[dtype])

    @property
    def sparse(self) -> bool:
        """Whether only the largest logits are sent."""
        return self.sent < self.classes

    @property
    def shifted(self) -> bool:
        """Whether logits are sent as distances from an origin."""
        return self.dtype != torch.float32

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._sections())

    def parts(self, payload: Tensor) -> list[Tensor]:
        """Views of the payload: origins and rests (positions, 1), classes and logits (positions, sent)."""
        views, start = [], 0
        for shape, dtype in self._sections():
            end = start + math.prod(shape) * dtype.itemsize
            views.append(payload[start:end].view(dtype).view(shape))
            start = end
        return views

    def blocks(self) -> Iterator[slice]:
        """Slices of positions."""
        step = max(1, _BLOCK // max(1, self.classes))
        return (slice(start, start + step) for start in range(0, self.positions, step))

    def _sections(self) -> list[tuple[tuple[int, int], torch.dtype]]:
        # The widest elements first: each section is then aligned.
        chosen = (self.positions, self.sent)
        return [
            ((self.positions, int(self.shifted)), torch.float32),
            ((self.positions, int(self.sparse)), torch.float32),
            (chosen if self.sparse else (self.positions, 0), torch.int32),
            (chosen, self.dtype),
        ]


def _encode_block(rows: Tensor, layout: _Layout, parts: Sequence[Tensor]) -> None:
    origins, rests, classes, logits = parts
    if layout.shifted:
        origins.copy_(rows.amax(-1, keepdim=True) if rows.dtype != layout.dtype else origins.new_zeros(()))
        rows = rows - origins  # float32, since origins are
    if not layout.sparse:
        logits.copy_(rows)
        return
    rest = rows.float() if rows.dtype != torch.float32 or layout.shifted else rows.clone()
    # Ascending classes show the reader at a glance that none comes twice.
    chosen = rest.topk(layout.sent, dim=-1, sorted=False).indices.sort(-1).values
    classes.copy_(chosen)
    logits.copy_(rest.gather(-1, chosen))
    # The sum of exponentials would hide an infinity, which must arrive.
    finite = rest.amin(-1, keepdim=True).isfinite()
    rest.scatter_(-1, chosen, -math.inf)
    rests.copy_(torch.where(finite, rest.logsumexp(-1, keepdim=True), math.nan))


def _decode_dense(parts: Sequence[Tensor]) -> Tensor:
    origins, _, _, logits = parts
    # A sum of two dtypes would take ten times as long on a CPU.
    return logits.float().add_(origins) if origins.numel() else logits.float()


def _decode_sparse(layout: _Layout, parts: Sequence[Tensor]) -> Tensor:
    origins, rests, classes, logits = parts
    classes = classes.long()  # differences of narrower ones may wrap
    good = (classes[:, :1] >= 0) & (classes[:, -1:] < layout.classes)
    good &= (classes.diff(dim=-1) > 0).all(-1, keepdim=True)
    logits, even = logits.float(), rests - math.log(layout.classes - layout.sent)
    if layout.shifted:
        logits, even = logits + origins, even + origins
    found = torch.where(good, even, math.nan).expand(-1, layout.classes).contiguous()
    return found.scatter_(-1, classes.clamp_(0, layout.classes - 1), torch.where(good, logits, math.nan))


def checksum(inputs: Sequence[Tensor]) -> int:
    """A signed 64-bit number that tells other inputs from the same: to notice an accident, not to resist an attack.

    Other samples, another order, other values or places within a sample, another dtype, shape or number of tensors
    change it. It is the same on every device and in every memory layout. Up to a megabyte is hashed as it is; the bits
    of more are laid out as a table whose rows and columns are summed where they lie, which takes two passes at the
    memory's speed, and the sums count with weights that depend on where they stand.

    Args:
        inputs: What a model is given: dense tensors; padding counts.
    """
    digest = hashlib.blake2b(digest_size=8)
    for tensor in inputs:
        digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
        octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
        tabled = len(octets) // _ROW_BYTES * _ROW_BYTES if len(octets) > _EXACT_BYTES else 0
        if tabled:
            digest.update(_buffer(_sums(octets[:tabled])))
        digest.update(_buffer(octets[tabled:]))
    return int.from_bytes(digest.digest(), "big", signed=True)


def _buffer(tensor: Tensor) -> Any:
    return tensor.cpu().numpy()


def _sums(octets: Tensor) -> Tensor:
    """Two int64: weighted sums of the table's rows and of its columns."""
    if octets.storage_offset() % 8:
        octets = octets.clone()  # a view of wider elements must start at one
    # Sums that need not widen their terms are twenty times as fast as others.
    table = octets.view(torch.int64).view(-1, _ROW_BYTES // 8)
    return torch.stack([(sums * _weights(sums)).sum() for sums in (table.sum(1), table.sum(0))])


def _weights(sums: Tensor) -> Tensor:
    """An odd pseudo-random int64 for each sum; products wrap."""
    mixed = torch.arange(1, len(sums) + 1, device=sums.device) * 0x1E3779B97F4A7C15
    mixed ^= mixed >> 29
    return (mixed * 0x3F58476D1CE4E5B9) | 1
