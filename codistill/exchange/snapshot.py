"""A state dict as a safetensors file: written from one reused host buffer, read without trusting it.

Owns the layout and its verification; knows no store and no network. What does not have exactly the names, shapes and
dtypes that the reader's own model has, or holds a NaN or an infinity, is `Refused`; nothing is unpickled, and no size
from the file is allocated before the file is known to be that large. A header may be about as long, and hold about as
many values, as the reader's own would: parsing it costs no more than the reader's own model suggests.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from codistill import config
from codistill.exchange import strict_json
from codistill.exchange.errors import Refused

WIRE_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in config.WIRE_DTYPES}
HEADER_BYTES = 16 * 1024 * 1024  # cap on the JSON header of any model
METADATA_BYTES = 64 * 1024  # what a header may have beyond twice our own: `__metadata__`, and another writer's spelling
METADATA_VALUES = 1024
_ALIGN = 64
_CODES: dict[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_Entry = tuple[str, tuple[int, ...]]  # dtype code, shape


class HostBuffer:
    """One persistent host buffer laid out as a safetensors file, filled by `copy_` into views of it.

    Allocated once, so that publishing neither allocates nor serialises; pinned when the state is on CUDA.

    Args:
        state: Tensors to make room for; tied ones take room once.
        dtype: Wire dtype of floating tensors, a key of `WIRE_DTYPES`; other tensors keep theirs.

    Raises:
        ValueError: For a tensor that a snapshot cannot carry (complex, sparse, quantised), or too many of them.
    """

    def __init__(self, state: Mapping[str, Tensor], dtype: str) -> None:
        tensors = distinct(state)
        entries = _entries(tensors, dtype)
        header, offsets, self.nbytes = _layout(entries)
        self._pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._buffer = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._views = {name: _view(self._buffer, offsets[name], *entry) for name, entry in entries.items()}

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy every tensor, from any device and layout; on return the live tensors may change freely.

        Raises:
            ValueError: When names or shapes are not those the buffer was made for.
        """
        devices = set()
        with torch.no_grad():
            for name, view in self._views.items():
                if name not in state or state[name].shape != view.shape:
                    raise ValueError(f"{name} is not the tensor that this buffer was made for")
                view.copy_(state[name], non_blocking=self._pinned)
                devices.add(state[name].device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the last `fill`, by name: views in the wire dtype, not to be written to."""
        return dict(self._views)

    def view(self) -> memoryview:
        """Return the whole safetensors file, read-only and without a copy; it changes with the next `fill`."""
        array: Any = self._buffer.numpy()
        return memoryview(array).toreadonly()


class Template:
    """What a peer's snapshot must look like: names, shapes and dtypes.

    Args:
        state: The state of a module of the peer's architecture.
        dtype: Wire dtype that the run agreed on, a key of `WIRE_DTYPES`.

    Attributes:
        limit: Bytes that no acceptable file exceeds; check a claimed size against it before fetching.

    Raises:
        ValueError: As for `HostBuffer`.
    """

    def __init__(self, state: Mapping[str, Tensor], dtype: str) -> None:
        self._entries = _entries(distinct(state), dtype)
        own, _, size = _layout(self._entries)
        self._header_limit = min(HEADER_BYTES, 2 * len(own) + METADATA_BYTES)
        self._value_limit = strict_json.most_values(own[8:]) + METADATA_VALUES
        self.limit = 8 + self._header_limit + size - len(own)

    def open(self, path: Path, *, verified: bool = False) -> dict[str, Tensor]:
        """Map a file and verify it.

        Args:
            path: The file.
            verified: This machine has seen before that every value in it is sound; spares reading it all again.

        Returns:
            Views of the mapped file, by name; the mapping is private, and lives as long as one of them.

        Raises:
            Refused: "size", "format", "names", "dtype", "shape" or "non-finite".
            OSError: When the file cannot be read.
        """
        size = path.stat().st_size
        if not 8 <= size <= self.limit:
            raise Refused("size", f"snapshot: {size} bytes, between 8 and {self.limit} are expected")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        length = int.from_bytes(mapped[:8].numpy().tobytes(), "little")
        if length > min(self._header_limit, size - 8):
            raise Refused("format", f"snapshot: a header of {length} bytes in {size}, {self._header_limit} are allowed")
        offsets = self._verify(mapped[8 : 8 + length].numpy().tobytes(), size - 8 - length)
        start = 8 + length
        tensors = {}
        for name, entry in self._entries.items():
            if (start + offsets[name]) % _DTYPES[entry[0]].itemsize:
                raise Refused("format", f"snapshot: {name} is not aligned")
            tensors[name] = _view(mapped, start + offsets[name], *entry)
            if not verified:
                _require_sound(name, tensors[name])
        return tensors

    def _verify(self, header: bytes, payload: int) -> dict[str, int]:
        """Return where each tensor starts in the payload, once every claim of the header is known to be true."""
        claims = strict_json.loads(header, limit=self._header_limit, values=self._value_limit, depth=3)
        _check_metadata(claims.pop("__metadata__", {}))
        for name in sorted(claims.keys() ^ self._entries.keys()):
            raise Refused("names", f"snapshot: {name!r:.120} is {'unknown' if name in claims else 'missing'}")
        spans = []
        for name, (code, shape) in self._entries.items():
            claimed_code, claimed_shape, (begin, end) = _claim(name, claims[name])
            if claimed_code != code:
                raise Refused("dtype", f"snapshot: {name} is {claimed_code}, {code} is expected")
            if claimed_shape != shape:
                raise Refused("shape", f"snapshot: {name} is {list(claimed_shape)!s:.80}, {list(shape)} is expected")
            if end - begin != _nbytes(code, shape):
                raise Refused("format", f"snapshot: {name} spans {end - begin} bytes, not {_nbytes(code, shape)}")
            spans.append((begin, end, name))
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                raise Refused("format", f"snapshot: {name} starts at {begin}, not at {position}")
            position = end
        if position != payload:
            raise Refused("format", f"snapshot: {payload} bytes of payload, {position} are described")
        return {name: begin for begin, _, name in spans}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state as far as a snapshot carries it: not what `get_extra_state` adds, unless a tensor."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tied tensors (same storage, offset, shape and stride) once, under the first name in sorted order."""
    seen = set()
    found = {}
    for name in sorted(state):
        tensor = state[name]
        place = _place(tensor)
        if place is not None:
            key = (tensor.device, place, tensor.dtype, tensor.shape, tensor.stride())
            if key in seen:
                continue
            seen.add(key)
        found[name] = tensor
    return found


def _place(tensor: Tensor) -> Optional[tuple[int, int]]:
    """Where its elements lie, or on the meta device would lie; None when they lie nowhere, tied to nothing."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    if tensor.is_meta:  # all have the address 0 there
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    return (tensor.data_ptr(), 0) if tensor.data_ptr() else None


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of the names, dtypes, shapes and bytes of `distinct(state)`; same on every device."""
    digest = hashlib.sha256()
    for name, tensor in distinct(state).items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(array)
    return digest.hexdigest()


def load(module_state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy a verified snapshot into a module's state (as `tensors_of` gives it), casting to the dtypes there."""
    with torch.no_grad():
        for name, tensor in distinct(module_state).items():
            tensor.copy_(tensors[name])


def _entries(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, _Entry]:
    wire = WIRE_DTYPES[dtype]
    entries = {}
    for name, tensor in tensors.items():
        carried = wire if tensor.is_floating_point() else tensor.dtype
        if carried not in _CODES or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"a snapshot cannot carry {name}: {tensor.dtype}, {tensor.layout}")
        entries[name] = (_CODES[carried], tuple(tensor.shape))
    return entries


def _layout(entries: Mapping[str, _Entry]) -> tuple[bytes, dict[str, int], int]:
    """Return header bytes (with their length), where each tensor starts in the file, and the file's size."""
    header: dict[str, Any] = {}
    position = 0
    # Widest elements first: each tensor is then aligned to its own element, without gaps.
    for name, (code, shape) in sorted(entries.items(), key=lambda item: (-_DTYPES[item[1][0]].itemsize, item[0])):
        end = position + _nbytes(code, shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    if len(text) > HEADER_BYTES:
        raise ValueError(f"a snapshot cannot carry {len(entries)} tensors: a header of {len(text)} bytes is too long")
    start = 8 + len(text)
    starts = {name: start + claim["data_offsets"][0] for name, claim in header.items()}
    return len(text).to_bytes(8, "little") + text, starts, start + position


def _nbytes(code: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _DTYPES[code].itemsize


def _view(buffer: Tensor, start: int, code: str, shape: tuple[int, ...]) -> Tensor:
    return buffer[start : start + _nbytes(code, shape)].view(_DTYPES[code]).view(shape)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused("format", "snapshot: __metadata__ is not a map from text to text")


def _claim(name: str, claim: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return dtype code, shape and offsets that a header entry claims, well-formed but not yet believed."""
    if not isinstance(claim, dict) or claim.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused("format", f"snapshot: {name} is not described by dtype, shape and data_offsets")
    code, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise Refused("format", f"snapshot: {name} has an unknown dtype {code!r:.40}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise Refused("format", f"snapshot: {name} has a malformed shape or malformed offsets")
    return code, tuple(shape), (offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _require_sound(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    if tensor.dtype == torch.bool and tensor.view(torch.uint8).max() > 1:  # no operation expects such a boolean
        raise Refused("format", f"snapshot: {name} holds bytes that are neither true nor false")
    if not tensor.is_floating_point():
        return
    # One pass without a temporary: a NaN anywhere is both the least and the greatest.
    extremes = torch.stack(torch.aminmax(tensor)).tolist()
    if not all(map(math.isfinite, extremes)):
        raise Refused("non-finite", f"snapshot: {name} holds NaN or infinity")
