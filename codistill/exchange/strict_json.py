"""JSON as read from strangers: one UTF-8 object, small, shallow, unambiguous.

What the standard parser would let through (duplicate keys, NaN, Infinity, 1e999, unbounded integers, lone surrogates)
is refused, so that two readers can never understand the same bytes differently. Bytes and values are counted before
anything is parsed, since a value takes many times more memory than its text: what a text can cost is known beforehand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Optional

from codistill.exchange.errors import Refused

LIMIT = 64 * 1024
DEPTH = 8
_BYTES_PER_VALUE = 8  # fewer, over a whole text of the greatest length, is not a document but a bomb
_INT_DIGITS = 20  # enough for any 64-bit integer and its sign


def loads(data: bytes, *, limit: int = LIMIT, values: Optional[int] = None, depth: int = DEPTH) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: UTF-8 text.
        limit: Most bytes accepted.
        values: Most values accepted, as `most_values` counts them; without it one for every 8 bytes of `limit`.
        depth: Most levels of nesting accepted; the object itself is the first.

    Raises:
        Refused: "size" beyond `limit` or `values`, "format" for anything else that is off.
    """
    if len(data) > limit:
        raise Refused("size", f"{len(data)} bytes of JSON, {limit} are allowed")
    allowed = limit // _BYTES_PER_VALUE if values is None else values
    if most_values(data) > allowed:
        raise Refused("size", f"up to {most_values(data)} values in {len(data)} bytes of JSON, {allowed} are allowed")
    try:
        value = json.loads(
            bytes(data).decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_int,
            parse_float=_float,
        )
        _check(value, depth)
    except (ValueError, RecursionError) as error:
        raise Refused("format", f"not strict JSON: {_short(error)}") from None
    if not isinstance(value, dict):
        raise Refused("format", "not strict JSON: the top level is not an object")
    return value


def most_values(data: bytes) -> int:
    """Return how many values JSON text can have at most, without parsing it; never fewer than it has."""
    # Every value but the outermost comes first in a list or an object, or after a comma.
    return 1 + sum(map(data.count, (b",", b"[", b"{")))


def dumps(value: Mapping[str, Any]) -> bytes:
    """Write canonical JSON: sorted keys, no spaces, UTF-8. ValueError for NaN and infinities."""
    text = json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _int(text: str) -> int:
    if len(text) > _INT_DIGITS or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError("an integer does not fit 64 bits")
    return value


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number does not fit a double")
    return value


def _check(value: Any, depth: int) -> None:
    """Bound the nesting and find strings that are not Unicode text (UnicodeEncodeError is a ValueError)."""
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, (dict, list)):
        if depth == 0:
            raise ValueError("nested too deeply")
        for key in value if isinstance(value, dict) else ():
            key.encode("utf-8")
        for item in value.values() if isinstance(value, dict) else value:
            _check(item, depth - 1)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
