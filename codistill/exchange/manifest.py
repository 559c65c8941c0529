"""The two small documents of the exchange: a snapshot's manifest and a peer's `latest.json`.

Both are read from places that anyone with access to the store can write to: every key must be there, none may be
unknown, every value has a type and a range, and the caps are checked before a byte is parsed. `parse` returns a
document that can be relied on, or raises `Refused`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Optional, Protocol

from codistill.config import RUN_ID, WIRE_DTYPES
from codistill.exchange import strict_json
from codistill.exchange.errors import Refused
from codistill.exchange.signing import sign, signed_by

FORMAT = 1
MANIFEST_BYTES = 64 * 1024
LATEST_BYTES = 512 * 1024
ARCHITECTURE_BYTES = 16 * 1024
MOST = 2**62  # for a count: who counts on from it stays within 64 bits
RETAINED = 4096  # most references in one latest.json

_Data = bytes  # by its other name where a field is called bytes
_HEX = re.compile(r"[0-9a-f]{64}")
_PAYLOAD = re.compile(r"(0|[1-9][0-9]{0,18})-[0-9A-Za-z]{4,64}\.safetensors")
_METRICS = 64  # most metrics in one manifest


@dataclass(frozen=True)
class Reference:
    """Where one snapshot of a known peer stands on the store."""

    incarnation: int
    update: int
    sequence: int


@dataclass(frozen=True)
class Manifest:
    """What a peer says about one of its snapshots; immutable on the store.

    Attributes:
        run: Run identifier.
        peer: Number of the peer, from 0.
        incarnation: Which start of that peer wrote it, from 1.
        sequence: Grows by one with each publication.
        update: The host's update counter at the copy of the weights.
        epoch: The host's epoch then.
        final: True for the last snapshot of a training that ended normally; such a snapshot never goes stale.
        payload: Object name UPDATE-NONCE.safetensors inside the incarnation's folder.
        bytes: Size of the payload.
        sha256: Digest of the payload, hex.
        dtype: Wire dtype of the floating tensors, one of `codistill.config.WIRE_DTYPES`.
        fingerprint: Digest of the output space (dictionary or class list), hex.
        init_hash: Digest of the weights that the peer started from, hex.
        metrics: Finite numbers to show, by name.
        architecture: Registry name and JSON arguments of the model, or None.
        hmac: Signature over everything else in here, hex; None when the run has no key.
    """

    run: str
    peer: int
    incarnation: int
    sequence: int
    update: int
    epoch: int
    final: bool
    payload: str
    bytes: int
    sha256: str
    dtype: str
    fingerprint: str
    init_hash: str
    metrics: Mapping[str, float]
    architecture: Optional[Mapping[str, Any]]
    hmac: Optional[str] = None

    @property
    def reference(self) -> Reference:
        """Where it stands."""
        return Reference(self.incarnation, self.update, self.sequence)

    def to_json(self) -> _Data:
        """Write the document; metrics that are not finite are left out, as JSON cannot say them."""
        return strict_json.dumps(self._plain())

    @classmethod
    def parse(cls, data: _Data) -> Manifest:
        """Read the document, or raise `Refused` ("size" or "format")."""
        return cls._from(strict_json.loads(data, limit=MANIFEST_BYTES))

    def signed(self, key: _Data) -> Manifest:
        """The same manifest with its signature."""
        return replace(self, hmac=sign(self._unsigned(), key))

    def check_signature(self, key: _Data) -> None:
        """Raise `Refused` ("signature") unless whoever wrote this knew `key`."""
        if self.hmac is None:
            raise Refused("signature", f"the manifest of update {self.update} is not signed, and a key is set here")
        if not signed_by(self._unsigned(), self.hmac, key):
            raise Refused("signature", f"the manifest of update {self.update} was not signed with the key set here")

    def _unsigned(self) -> _Data:
        return strict_json.dumps({**self._plain(), "hmac": None})

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["format"] = FORMAT
        plain["metrics"] = {name: float(value) for name, value in self.metrics.items() if math.isfinite(value)}
        # As JSON has it: keys that are no texts would be sorted otherwise before the way through the store than after.
        plain["architecture"] = None if self.architecture is None else json.loads(json.dumps(dict(self.architecture)))
        return plain

    @classmethod
    def _from(cls, plain: dict[str, Any]) -> Manifest:
        take = Taker("manifest", plain, {field.name for field in fields(cls)})
        update = take.count("update")
        return cls(
            run=take.text("run", RUN_ID),
            peer=take.count("peer"),
            incarnation=take.count("incarnation", at_least=1),
            sequence=take.count("sequence"),
            update=update,
            epoch=take.count("epoch"),
            final=take.flag("final"),
            payload=take.payload("payload", update),
            bytes=take.count("bytes"),
            sha256=take.text("sha256", _HEX),
            dtype=take.choice("dtype", WIRE_DTYPES),
            fingerprint=take.text("fingerprint", _HEX),
            init_hash=take.text("init_hash", _HEX),
            metrics=take.metrics("metrics"),
            architecture=take.small("architecture", ARCHITECTURE_BYTES),
            hmac=None if plain["hmac"] is None else take.text("hmac", _HEX),
        )


@dataclass(frozen=True)
class Latest:
    """A peer's only document that changes, so that readers poll one known name and nobody lists.

    Attributes:
        peer: Number of the peer.
        run: Run identifier.
        incarnation: Which start of the peer wrote it.
        token: sha256 of the owner's secret token, hex.
        heartbeat: Grows by one with every overwrite, from 0 at every start.
        resume_floor: Lowest update that this peer could restart from.
        closed: True when the peer's training ended normally.
        manifest: The newest snapshot; None until the first publication.
        retained: Every snapshot that is still on the store, oldest first, at most `RETAINED`.
    """

    peer: int
    run: str
    incarnation: int
    token: str
    heartbeat: int
    resume_floor: int
    closed: bool
    manifest: Optional[Manifest]
    retained: tuple[Reference, ...]

    def to_json(self) -> bytes:
        """Write the document."""
        plain: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["format"] = FORMAT
        plain["manifest"] = None if self.manifest is None else self.manifest._plain()
        plain["retained"] = [[item.incarnation, item.update, item.sequence] for item in self.retained]
        return strict_json.dumps(plain)

    @classmethod
    def parse(cls, data: bytes) -> Latest:
        """Read the document, or raise `Refused` ("size", "format", "run" or "peer")."""
        plain = strict_json.loads(data, limit=LATEST_BYTES, depth=strict_json.DEPTH + 1)
        take = Taker("latest.json", plain, {field.name for field in fields(cls)})
        inner = take.optional("manifest", dict)
        latest = cls(
            peer=take.count("peer"),
            run=take.text("run", RUN_ID),
            incarnation=take.count("incarnation", at_least=1),
            token=take.text("token", _HEX),
            heartbeat=take.count("heartbeat"),
            resume_floor=take.count("resume_floor"),
            closed=take.flag("closed"),
            manifest=None if inner is None else Manifest._from(inner),
            retained=take.references("retained"),
        )
        if latest.manifest is not None:
            same_place(latest.manifest, latest.run, latest.peer)
        return latest


class Placed(Protocol):
    """A document that says where it belongs."""

    @property
    def run(self) -> str:
        """Run identifier."""

    @property
    def peer(self) -> int:
        """Number of the peer."""


def same_place(document: Placed, run: str, peer: int) -> None:
    """Refuse ("run" or "peer") a document that does not belong where it was read from."""
    if document.run != run:
        raise Refused("run", f"a document of run {document.run} stands where run {run} keeps its own")
    if document.peer != peer:
        raise Refused("peer", f"a document of peer {document.peer} stands where peer {peer} keeps its own")


class Taker:
    """Takes checked values out of a parsed object; each method raises Refused("format") naming the key."""

    def __init__(self, what: str, plain: dict[str, Any], names: set[str]) -> None:
        self._what = what
        self._plain = plain
        # The format comes first: a document of a later format has other keys, and should say so.
        if "format" in plain and self.count("format") != FORMAT:
            raise Refused("format", f"{what}: format {plain['format']}; this version reads format {FORMAT}")
        for key in sorted((names | {"format"}) ^ plain.keys()):
            raise Refused("format", f"{what}: {'unknown' if key in plain else 'no'} key {key!r:.60}")

    def _bad(self, key: str, allowed: str) -> Refused:
        return Refused("format", f"{self._what}: {key}: {allowed} is expected, not {self._plain[key]!r:.60}")

    def count(self, key: str, at_least: int = 0) -> int:
        """A whole number."""
        value = self._plain[key]
        if type(value) is not int or not at_least <= value <= MOST:
            raise self._bad(key, f"an integer from {at_least} to {MOST}")
        return value

    def flag(self, key: str) -> bool:
        """A truth value."""
        value = self._plain[key]
        if not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def text(self, key: str, pattern: re.Pattern[str]) -> str:
        """A text of the given form."""
        value = self._plain[key]
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self._bad(key, "64 hex digits" if pattern is _HEX else f"text like {pattern.pattern}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the texts allowed."""
        value = self._plain[key]
        if value not in allowed:
            raise self._bad(key, " or ".join(allowed))
        return value

    def payload(self, key: str, update: int) -> str:
        """The name of an update's payload."""
        value = self.text(key, _PAYLOAD)
        if not value.startswith(f"{update}-"):
            raise self._bad(key, f"a name starting with {update}-")
        return value

    def optional(self, key: str, kind: type) -> Any:
        """A value of the given type, or None."""
        value = self._plain[key]
        if value is not None and not isinstance(value, kind):
            raise self._bad(key, "an object or null")
        return value

    def small(self, key: str, limit: int) -> Any:
        """An object of at most `limit` bytes as JSON, or None."""
        value = self.optional(key, dict)
        if value is not None and len(strict_json.dumps(value)) > limit:
            raise Refused("format", f"{self._what}: {key}: an object of at most {limit} bytes is expected")
        return value

    def metrics(self, key: str) -> dict[str, float]:
        """Numbers by name."""
        value = self._plain[key]
        if not isinstance(value, dict) or len(value) > _METRICS:
            raise self._bad(key, f"an object of at most {_METRICS} numbers")
        if any(type(number) not in (int, float) for number in value.values()):
            raise self._bad(key, "an object of numbers")
        return {name: float(number) for name, number in value.items()}

    def references(self, key: str) -> tuple[Reference, ...]:
        """A list of references."""
        value = self._plain[key]
        if not isinstance(value, list) or len(value) > RETAINED or not all(map(_is_reference, value)):
            raise self._bad(key, f"a list of at most {RETAINED} [incarnation, update, sequence]")
        return tuple(Reference(*item) for item in value)


def _is_reference(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 3 and all(type(part) is int and 0 <= part <= MOST for part in item)
