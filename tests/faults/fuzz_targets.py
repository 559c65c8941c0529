"""Everything that reads what somebody else wrote, as targets of a fuzzer: seeds, a way to read and a way to write.

The property is the same for all: bytes are read, and what was read is written and read again without a change; or they
are refused, for a documented cause, in one line. Any other exception is a finding. Known to `tests.faults.fuzz`, which
mutates with coverage for as long as one likes, and to the suite, which does so for a moment.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from obstore.store import MemoryStore

from codistill.exchange import strict_json
from codistill.exchange.checkpoint.meeting import Proposal, decode, encode
from codistill.exchange.errors import Refused
from codistill.exchange.manifest import Latest, Manifest, Reference
from codistill.exchange.objects import Objects
from codistill.exchange.prediction import posts
from codistill.exchange.protocol import Position
from codistill.exchange.snapshot import HostBuffer, Template
from codistill.exchange.store import RunStore
from tests.fixtures_store import make_latest, make_manifest

CAUSES = frozenset(re.findall(r"[a-z-]+", re.search(r"Causes:([^.]*)\.", Refused.__doc__ or "")[1]))
LINE = 500  # most characters of a refusal's one line
TERMS = {"interval": 50, "loss": "kl", "temperature": 2.0, "sync": False}
STATE = {
    "a": torch.tensor([[1.0, -2.0], [0.5, 3.0]]),
    "b": torch.arange(3),
    "c": torch.tensor([True, False]),
    "d": torch.empty(0, 2),
    "e": torch.tensor(7, dtype=torch.int8),
}


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        read: Bytes to whatever they mean; the only exception allowed is `Refused`.
        write: That to bytes again.
        seeds: Valid inputs to start from.
        longest: Most bytes worth trying: a little more than the reader accepts, or than it can tell apart.
        split: Takes the JSON out of an input: what comes before, the JSON, what follows. None: there is none.
        join: Undoes `split`.
    """

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]
    seeds: Callable[[], list[bytes]]
    longest: int
    split: Callable[[bytes], tuple[bytes, bytes]] | None = lambda data: (data, b"")
    join: Callable[[bytes, bytes], bytes] = lambda text, rest: text + rest


def outcome(target: Target, data: bytes) -> str:
    """Hold one input against the property: "accepted", or the cause for which it is refused; else an exception."""
    try:
        value = target.read(data)
    except Refused as error:
        return _judged(error)
    written = target.write(value)
    assert target.write(target.read(written)) == written, "what was accepted reads differently when written again"
    return "accepted"


def _judged(error: Refused) -> str:
    assert error.cause in CAUSES, f"cause {error.cause!r} is not documented"
    assert str(error).isprintable(), f"not one printable line: {str(error)!r}"
    assert len(str(error)) <= LINE, f"{len(str(error))} characters of message"
    return error.cause


def mutate(target: Target, data: bytes, seed: int) -> bytes | None:
    """Change one value or key of the JSON in an input, or one byte behind it, so that most inputs pass the parser.

    Args:
        target: Knows where the JSON is.
        data: The input.
        seed: Decides the change.

    Returns:
        The changed input; None where there is nothing to change.
    """
    if target.split is None:
        return None
    draw = random.Random(seed)
    text, rest = target.split(data)
    if rest and draw.randrange(3) == 0:
        return target.join(text, _with_a_changed_byte(rest, draw))
    try:
        document = json.loads(text)
        places = list(_places(document))
        if not places:
            return None
        _change(*draw.choice(places), places, draw)
        return target.join(json.dumps(document).encode(), rest)
    except (ValueError, RecursionError):  # no JSON, or a container was moved into itself
        return None


def _with_a_changed_byte(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + draw.randbytes(1) + data[place + 1 :]


def _change(holder: Any, key: Any, places: list[tuple[Any, Any]], draw: random.Random) -> None:
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice([*_NAMES, *map(str, _ODD)])] = holder[key]
    elif kind == 2:
        other, name = draw.choice(places)
        holder[key] = other[name]
    else:
        alike = [odd for odd in _ODD if type(odd) is type(holder[key])]
        holder[key] = draw.choice(alike if alike and kind > 3 else _ODD)


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    if isinstance(document, (dict, list)):
        for key in list(document) if isinstance(document, dict) else range(len(document)):
            yield document, key
            yield from _places(document[key])


_NAMES = ("a", "b", "format", "__metadata__", "manifest", "update", "f")
_ODD: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 8, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**25, 0.0, -0.0, 1.5, 1e308, 1e-320, 1e22),
    *(float("nan"), float("inf"), None, True, False),
    *("", "0", "run", "../..", "\n", "\0", "\ud800", "\N{RIGHT-TO-LEFT OVERRIDE}", "a" * 64, "0" * 64, "x" * 300),
    *("float32", "bfloat16", "F32", "BF16", "I64", "BOOL", "100-aaaa.safetensors", "100-../x.safetensors"),
    *([], {}, [[]], [0, 0], [1, 100, 1], {"a": {}}, [1] * 100, [[1, 1, 1]] * 5, {"dtype": "F32"}),
)


def _agree(data: bytes) -> dict[str, Any]:
    """Read run.json as a peer that joins does."""
    objects = Objects.over(MemoryStore())
    objects.put("run/run.json", data)
    RunStore(objects, "run").agree(TERMS)
    return strict_json.loads(data)


def _run_json(run: str = "run", **changes: Any) -> bytes:
    return strict_json.dumps({"format": 1, "run": run, "terms": {**TERMS, **changes}})


class _Snapshots:
    """Reads a snapshot as a fetcher does, from a file."""

    def __init__(self, path: Path) -> None:
        self._template = Template(STATE, "float32")
        self._path = path

    def read(self, data: bytes) -> dict[str, torch.Tensor]:
        self._path.unlink(missing_ok=True)  # what is still mapped stays as it was
        self._path.write_bytes(data)
        return self._template.open(self._path)

    @staticmethod
    def write(state: dict[str, torch.Tensor]) -> bytes:
        buffer = HostBuffer(state, "float32")
        buffer.fill(state)
        return bytes(buffer.view())


def _header(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _proposal_seeds() -> list[bytes]:
    proposals = [Proposal.of(make_manifest()), Proposal(3, Reference(1, 2, 3), "8f" * 32, True)]
    return [_proposal_bytes((3, None)), *(_proposal_bytes((proposal.peer, proposal)) for proposal in proposals)]


def _proposal_bytes(place: tuple[int, Proposal | None]) -> bytes:
    return struct.pack("<9q", *encode(*place))


def _latest_seeds() -> list[bytes]:
    retained = (Reference(1, 50, 0), Reference(1, 100, 1))
    latest = [make_latest(), make_latest(make_manifest(), retained=retained, closed=True)]
    return [one.to_json() for one in latest]


def _post_seeds() -> list[bytes]:
    group = posts.Proposal(3, (0, 1), "127.0.0.1", 29500, Position(1, 40), 25)
    alone = posts.Post("run", 1, 2, 9, "away", TERMS, "0" * 64, 1, 15, 1, 9000, 0, 1, None)
    return [alone.to_json(), replace(alone, state="ready", generation=2, proposal=group).to_json()]


def targets(folder: Path) -> dict[str, Target]:
    """Every target by name; `folder` is for the file that snapshots are read from."""
    snapshots = _Snapshots(folder / "snapshot.safetensors")
    manifests = [make_manifest(), make_manifest(architecture=None, metrics={}, final=True, hmac="b" * 64)]
    documents = [one.to_json() for one in manifests]
    return {
        "strict_json": Target(
            lambda data: strict_json.loads(data),
            strict_json.dumps,
            lambda: [b"{}", b'{"a":[1,-2.5e3,null,true,"\\u00e9"],"b":{"c":[[]]}}', *documents],
            strict_json.LIMIT + 100,
        ),
        "manifest": Target(Manifest.parse, Manifest.to_json, lambda: documents, 8192),
        "latest": Target(Latest.parse, Latest.to_json, _latest_seeds, 8192),
        "post": Target(
            lambda data: posts.Post.parse(data, "run", 1),
            posts.Post.to_json,
            _post_seeds,
            8192,
        ),
        "run": Target(
            _agree, strict_json.dumps, lambda: [_run_json(), _run_json(loss="mse"), _run_json("other")], 4096
        ),
        "snapshot": Target(
            snapshots.read,
            snapshots.write,
            lambda: [snapshots.write(STATE), snapshots.write({**STATE, "a": STATE["a"] * float("inf")})],
            8192,
            _header,
            lambda text, rest: len(text).to_bytes(8, "little") + text + rest,
        ),
        "proposal": Target(
            lambda data: decode(struct.unpack("<9q", data[:72].ljust(72, b"\0"))),
            _proposal_bytes,
            _proposal_seeds,
            72,
            None,
        ),
    }
