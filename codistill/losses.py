"""The distance D between our logits and our peers', with its gradient, in one pass.

Owns the numbers of the penalty: kl, mse or ce, temperature, masks, the mean over peers, agreement.
Promises: nothing but ``own`` receives a gradient; a peer whose logits are not finite at a counted position, or would
make D infinite, is left out of this call before D is taken, on the device, so that no NaN of a peer's reaches a loss or
a gradient; our own non-finite logits come out as a non-finite loss, for the host to handle; no more than one extra
tensor of the logits' size is held, in ``own``'s own precision, and none where a peer's logits may be overwritten; on an
accelerator nothing waits for the device. On a GPU `codistill.fused` does the pass in one kernel where it can.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from codistill.config import LOSSES

# Logits per chunk: small enough on a CPU for a chunk's few temporaries to stay in its caches, large enough elsewhere
# for the launch of a kernel not to count.
_CPU_ELEMENTS = 2**18
_DEVICE_ELEMENTS = 2**24
_MOST = 2.0**40  # largest logit of a peer's with mse: of its square float32 holds the sum over 2**47 logits


@dataclass(frozen=True)
class Distilled:
    """What `distill` found; every field a 0-dim tensor on own's device.

    Attributes:
        loss: Sum over counted positions of the mean over usable peers of D; float32 (float64 for float64 logits),
            differentiable with respect to own, once; 0 when no peer is usable.
        agreement: Number of counted positions at which own's and a peer's largest logit belong to the same class (in
            a tie: to one class at least), averaged over usable peers; float32.
        positions: Number of counted positions; float32.
        peers: Number of usable peers; float32.
    """

    loss: Tensor
    agreement: Tensor
    positions: Tensor
    peers: Tensor


def distill(
    own: Tensor,
    peers: Sequence[Tensor],
    *,
    loss: str,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk: int | None = None,
    overwrite: bool = False,
) -> Distilled:
    """Measures how far own logits are from the peers', summed over positions, averaged over peers.

    Per position, with p and q the softmax of a peer's and of own logits divided by the temperature T:

    * ``kl``: T² · KL(p ‖ q), and ``ce``: −T² · Σ p log q. The factor keeps gradients comparable between temperatures
      (Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2).
    * ``mse``: mean over classes of the squared difference of the logits as they are.

    All of it is computed in float32 whatever the logits' precision and autocast (float64 for float64 logits). The
    gradient is taken together with the value and given away in backward, hence only one backward for each call, and no
    second derivative; a RuntimeError says so.

    Args:
        own: Own logits, any shape ending in the number of classes, any floating dtype and layout.
        peers: The peers' logits, each of own's shape.
        loss: One of `codistill.config.LOSSES`.
        temperature: T above; 1 with ``mse``.
        mask: Booleans of own's shape without its last dimension, True where a position counts; all count without
            it. Whatever the logits hold elsewhere, even NaN, has no influence.
        chunk: Positions worked on at a time; chosen by the device without it.
        overwrite: The peers' logits are needed no more, and share memory with nothing that is: the gradient may take
            the place of one peer's. A tensor of that size costs more to make than to fill on a CPU, since its memory
            comes page by page.

    Returns:
        The sum with its companions.

    Raises:
        ValueError: Shapes that do not match, a loss, temperature or chunk that is not allowed.
    """
    _check(own, peers, loss, temperature, mask, chunk)
    with torch.no_grad():
        counted = torch.ones((), dtype=torch.bool, device=own.device) if mask is None else mask
        counted = counted.expand(own.shape[:-1])
        peaks = [peer.amax(-1) for peer in peers]
        # Nor beyond what our own logits could be: the gradient, of their precision, holds the difference itself.
        most = min(_MOST, torch.finfo(own.dtype).max) if loss == "mse" else math.inf
        usable = [_usable(peer, peak, temperature, most, counted) for peer, peak in zip(peers, peaks, strict=True)]
        work = _Work(
            peers=[peer.detach() for peer in peers],
            peaks=peaks,
            rows=[counted & flag for flag in usable],
            count=torch.stack(usable).sum() if usable else counted.new_zeros((), dtype=torch.long),
            loss=loss,
            temperature=float(temperature),
            chunk=chunk or _positions_per_chunk(own),
        )
        positions = counted.sum().float()
    if torch.is_grad_enabled() and own.requires_grad:
        total, agreement = _Penalty.apply(own, work, overwrite)
    else:
        total, agreement = work.measure(own.detach(), None)
    return Distilled(loss=total, agreement=agreement, positions=positions, peers=work.count.float())


def _check(
    own: Tensor, peers: Sequence[Tensor], loss: str, temperature: float, mask: Tensor | None, chunk: int | None
) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature} is not a finite number above 0")
    if loss == "mse" and temperature != 1:
        raise ValueError(f"temperature {temperature} has no meaning for mse, which compares logits as they are: use 1")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} is not at least 1 position")
    for index, peer in enumerate(peers):
        if peer.shape != own.shape:
            raise ValueError(f"peers[{index}] has shape {tuple(peer.shape)}, own has {tuple(own.shape)}")
    if mask is not None and (mask.shape != own.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and {mask.dtype}, not {tuple(own.shape[:-1])} and torch.bool"
        )


def _usable(peer: Tensor, peak: Tensor, temperature: float, most: float, counted: Tensor) -> Tensor:
    """Whether a peer's counted logits, `peak` the largest of each position, are finite and within ±`most`; 0-dim bool.

    The spread of each position's logits is not finite when one of them is not, nor when it leaves float32's range,
    which would turn into NaN further on. Two reductions without temporaries read the logits far faster than isfinite.
    """
    peak, least = peak.float(), peer.amin(-1).float()
    fine = ((peak - least) / temperature).isfinite()
    if most < math.inf:
        fine &= (peak <= most) & (least >= -most)
    return (fine | ~counted).all()


def _positions_per_chunk(own: Tensor) -> int:
    elements = _CPU_ELEMENTS if own.device.type == "cpu" else _DEVICE_ELEMENTS
    return max(1, elements // max(1, own.shape[-1]))


def _kernel(own: Tensor, peers: Sequence[Tensor]) -> ModuleType | None:
    """`codistill.fused`, where it can work on these logits; the compiler has kernels of its own."""
    if not own.is_cuda or torch.compiler.is_compiling():
        return None
    from codistill import fused  # only now, as it imports Triton, which takes a second

    return fused if fused.runs(own, peers) else None


@dataclass(frozen=True)
class _Work:
    """One call's peers and terms.

    Attributes:
        peers: Detached logits.
        peaks: For each peer, the largest logit of each position.
        rows: For each peer, True at the positions where it counts.
        count: Number of usable peers, 0-dim.
        loss: One of `codistill.config.LOSSES`.
        temperature: T.
        chunk: Positions worked on at a time.
    """

    peers: list[Tensor]
    peaks: list[Tensor]
    rows: list[Tensor]
    count: Tensor
    loss: str
    temperature: float
    chunk: int

    def measure(self, own: Tensor, pulls: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns loss and agreement; fills `pulls`, when given, with what times `unit` / `count` is the gradient."""
        wide = torch.float64 if own.dtype == torch.float64 else torch.float32
        # Kept by position and summed once, so that the result does not depend on the chunks.
        losses = own.new_zeros(own.shape[:-1], dtype=wide)
        agreed = own.new_zeros(own.shape[:-1], dtype=torch.float32)
        if (kernel := _kernel(own, self.peers)) is not None:
            self._by_kernel(kernel, own, losses, agreed, pulls)
        else:
            self._by_blocks(own, losses, agreed, pulls)
        share = self.count.clamp(min=1)
        return losses.sum() / share, agreed.sum() / share

    def _by_kernel(self, kernel: ModuleType, own: Tensor, losses: Tensor, agreed: Tensor, pulls: Tensor | None) -> None:
        if pulls is not None and not self.peers:
            pulls.zero_()
        peak = own.amax(-1)
        # The peer whose place the pulls take is read before the others' pulls are added to them.
        order = sorted(range(len(self.peers)), key=lambda index: self.peers[index] is not pulls)
        for turn, index in enumerate(order):
            kernel.add(
                own,
                peak,
                self.peers[index],
                self.peaks[index],
                self.rows[index],
                losses,
                agreed,
                pulls,
                loss=self.loss,
                temperature=self.temperature,
                first=turn == 0,
                room=1.0 if pulls is None else self.room(pulls),
            )

    def _by_blocks(self, own: Tensor, losses: Tensor, agreed: Tensor, pulls: Tensor | None) -> None:
        wide = losses.dtype
        for block in _blocks(own.shape[:-1], self.chunk):
            mine = _Side(own[block], own[block].amax(-1), wide, self)
            pull = None
            for peer, peak, rows in zip(self.peers, self.peaks, self.rows, strict=True):
                keep = rows[block].flatten()
                theirs = _Side(peer[block], peak[block], wide, self)
                losses[block] += torch.where(keep, mine.distance(theirs), 0.0).view_as(losses[block])
                agreed[block] += (mine.agrees(theirs) & keep).view_as(agreed[block])
                if pulls is not None:
                    step = mine.step(theirs)
                    _zero_rows(step, keep)
                    pull = step if pull is None else pull.add_(step)
            if pulls is not None:
                self._store(pull, pulls[block])

    def place(self, own: Tensor, overwrite: bool) -> Tensor:
        """Where the pulls go: over a peer's logits, where allowed and of own's kind. Blocks are read before that."""
        for peer in self.peers if overwrite else ():
            alike = peer.dtype == own.dtype and peer.device == own.device
            if alike and peer.is_contiguous() and not peer.is_inference():  # torch lets nothing write to the latter
                return peer
        return torch.empty_like(own)

    def _store(self, pull: Tensor | None, there: Tensor) -> None:
        if pull is None:
            there.zero_()
            return
        if self.room(there) != 1.0:
            pull.mul_(self.room(there))
        there.copy_(pull.view_as(there))

    def room(self, pulls: Tensor) -> float:
        """The factor under which pulls are stored: a power of two, 1 except in float16.

        Of softmaxes over a large vocabulary most differences lie below float16's normal numbers, and the host's loss
        scale comes only in backward: they are stored larger, as far as the sum over the peers allows.
        """
        if pulls.dtype != torch.float16:
            return 1.0
        return 2.0 ** ((-1 if self.loss == "mse" else 15) - len(self.peers).bit_length())

    def unit(self, pulls: Tensor) -> float:
        """What the sum of stored pulls is to be multiplied by."""
        slope = 2.0 / pulls.shape[-1] if self.loss == "mse" else self.temperature
        return slope / self.room(pulls)


class _Side:
    """One model's logits of one chunk, as (positions, classes), and what is derived from them once."""

    def __init__(self, logits: Tensor, peak: Tensor, wide: torch.dtype, work: _Work) -> None:
        self.loss, self.factor = work.loss, work.temperature**2
        self.logits = logits.reshape(-1, logits.shape[-1]).to(wide)
        # Without its largest logit a large common offset costs no precision. At that logit the difference is 0.
        self.shifted = self.logits - peak.reshape(-1, 1).to(wide)
        if work.temperature != 1.0:
            self.shifted.mul_(1.0 / work.temperature)
        if self.loss != "mse":
            self.softmax = torch.softmax(self.shifted, -1)
            # log softmax = shifted + log_peak: cheaper than a second pass of exponentials.
            self.log_peak = self.softmax.amax(-1).log()

    def distance(self, peer: "_Side") -> Tensor:
        """D to that peer for each position."""
        if self.loss == "mse":
            return (self.logits - peer.logits).square_().mean(-1)
        if self.loss == "kl":
            ratio = (peer.shifted - self.shifted).mul_(peer.softmax).sum(-1)
            distance = ratio + (peer.log_peak - self.log_peak)
        else:
            distance = -((peer.softmax * self.shifted).sum(-1) + self.log_peak)
        return distance * self.factor

    def step(self, peer: "_Side") -> Tensor:
        """For each logit the direction in which D grows; uses up the peer's side."""
        if self.loss == "mse":
            return self.logits - peer.logits
        return torch.sub(self.softmax, peer.softmax, out=peer.softmax)

    def agrees(self, peer: "_Side") -> Tensor:
        """Whether the largest logits share a class: only there are both differences 0. Far faster than argmax."""
        return (self.shifted + peer.shifted).amax(-1) == 0


class _Penalty(torch.autograd.Function):
    """`_Work.measure` with the gradient it found on the way."""

    @staticmethod
    def forward(ctx, own: Tensor, work: _Work, overwrite: bool) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        # Not `work`: the peers' logits are no longer needed, and the gradient must have no other owner, or a sum with
        # the host's own would be a further tensor of that size.
        ctx.pulls = pulls = work.place(own, overwrite)
        ctx.unit, ctx.count, ctx.chunk = work.unit(pulls), work.count, work.chunk
        total, agreement = work.measure(own, pulls)
        ctx.mark_non_differentiable(agreement)
        return total, agreement

    @staticmethod
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        # once_differentiable would let this pass and leave the penalty out of the second derivative without a word.
        if torch.is_grad_enabled():
            raise RuntimeError("a penalty has no second derivative: create_graph=True cannot be used with it")
        # Scaled where it lies, as a copy would be a second tensor of the logits' size; hence the one use.
        pulls, ctx.pulls = ctx.pulls, None
        if pulls is None:
            raise RuntimeError("the gradient of a penalty can be taken only once; call distill again for another")
        factor = gradient * ctx.unit / ctx.count.clamp(min=1)
        if factor.dtype == pulls.dtype:
            return pulls.mul_(factor), None, None
        for block in _blocks(pulls.shape[:-1], ctx.chunk):
            pulls[block] = pulls[block].to(factor.dtype).mul_(factor)
        return pulls, None, None


def _zero_rows(values: Tensor, keep: Tensor) -> None:
    """Zeroes, in place, the rows that `keep` (True = stays) leaves out.

    An AND with all ones or none on the bits: a product would let NaN through, and masked_fill_ takes ten times as long
    on a CPU.
    """
    bits = torch.int64 if values.dtype == torch.float64 else torch.int32
    values.view(bits).bitwise_and_(-keep.to(bits).unsqueeze(-1))


def _blocks(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cuts leading dimensions into near-equal blocks of at most `limit` positions, without asking for a layout.

    Flattening the whole tensor first would copy it when it is a transposed or sliced view.
    """
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner <= limit:
        pieces = math.ceil(shape[0] / (limit // max(1, inner)))
        step = math.ceil(shape[0] / max(1, pieces))
        for start in range(0, shape[0], max(1, step)):
            yield (slice(start, start + step),)
        return
    for start in range(shape[0]):
        for rest in _blocks(shape[1:], limit):
            yield (slice(start, start + 1), *rest)
