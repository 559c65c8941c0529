"""What a peer says of itself to those it exchanges predictions with: `meeting.json`, overwritten with every beat.

Read from places that others can write to, as manifests are: every key must be there, none may be unknown, every value
has a type and a range. `Post.parse` returns a document that can be relied on, or raises `Refused`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Optional

from codistill.config import RUN_ID
from codistill.exchange import strict_json
from codistill.exchange.errors import Refused
from codistill.exchange.manifest import FORMAT, Taker, same_place
from codistill.exchange.protocol import Position

POST_BYTES = 32 * 1024
TERMS_BYTES = 8 * 1024
FAR = 2**40  # no position, pace or generation in a post may be larger
COUNTED = FAR // 2  # no larger generation of somebody else's is counted on from: what comes of it must fit a post, too
STATES = ("away", "ready", "gone")

_HEX = re.compile(r"[0-9a-f]{64}")
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}")
_MEMBERS = re.compile(r"[0-9]{1,4}(,[0-9]{1,4}){1,1023}")


@dataclass(frozen=True)
class Proposal:
    """A group to be formed.

    Attributes:
        generation: larger than that of every group before; from 1.
        members: the peers' numbers, ascending.
        host: where the store is through which the members connect.
        port: its port.
        start: the first micro-batch that they exchange.
        lead: micro-batches between the most advanced member and `start` when this was proposed.
    """

    generation: int
    members: tuple[int, ...]
    host: str
    port: int
    start: Position
    lead: int

    def to_json(self) -> bytes:
        """Write the document."""
        return strict_json.dumps(self._plain())

    @classmethod
    def parse(cls, data: bytes) -> Proposal:
        """Read the document, or raise `Refused` ("size" or "format")."""
        return cls._from(strict_json.loads(data, limit=POST_BYTES))

    def _plain(self) -> dict[str, Any]:
        plain = {name: value for name, value in asdict(self).items() if name != "start"}
        plain["members"] = ",".join(map(str, self.members))
        return {**plain, "format": FORMAT, "epoch": self.start.epoch, "batch": self.start.batch}

    @classmethod
    def _from(cls, plain: dict[str, Any]) -> Proposal:
        take = Taker("proposal", plain, {"generation", "members", "host", "port", "epoch", "batch", "lead"})
        members = tuple(map(int, take.text("members", _MEMBERS).split(",")))
        if list(members) != sorted(set(members)):
            raise Refused("format", "proposal: members: ascending numbers are expected")
        return cls(
            generation=take.count("generation", at_least=1),
            members=members,
            host=take.text("host", _HOST),
            port=take.count("port", at_least=1),
            start=Position(take.count("epoch"), take.count("batch")),
            lead=take.count("lead"),
        )


@dataclass(frozen=True)
class Post:
    """One peer's word.

    Attributes:
        run: Run identifier.
        peer: Number of the peer.
        incarnation: Which start of the peer wrote it.
        counter: Grows with every post of that start.
        state: One of `STATES`: "ready" for a group, or for another one.
        terms: What all members must agree on.
        init_hash: Digest of the weights that the peer started from, hex.
        epoch: Where the peer's last update began.
        batch: Micro-batches of that epoch before it.
        step: Micro-batches in one of its updates.
        pace: Micro-batches that it does in 1000 seconds.
        generation: The newest group that it was in, or tried to be in; 0 for none.
        leader: Whose proposals it takes up; its own number while it leads.
        proposal: The group that it proposes.
    """

    run: str
    peer: int
    incarnation: int
    counter: int
    state: str
    terms: Mapping[str, Any]
    init_hash: str
    epoch: int
    batch: int
    step: int
    pace: int
    generation: int
    leader: int
    proposal: Optional[Proposal]

    @property
    def position(self) -> Position:
        """Where the peer's last update began."""
        return Position(self.epoch, self.batch)

    def to_json(self) -> bytes:
        """Write the document."""
        plain: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["proposal"] = None if self.proposal is None else self.proposal._plain()
        return strict_json.dumps({**plain, "format": FORMAT})

    @classmethod
    def parse(cls, data: bytes, run: str, peer: int) -> Post:
        """Read the document where `peer` of `run` keeps its own.

        Raises:
            Refused: "size", "format", "run" or "peer".
        """
        plain = strict_json.loads(data, limit=POST_BYTES)
        take = Taker("meeting.json", plain, {field.name for field in fields(cls)})
        inner = take.optional("proposal", dict)
        post = cls(
            run=take.text("run", RUN_ID),
            peer=take.count("peer"),
            incarnation=take.count("incarnation", at_least=1),
            counter=take.count("counter"),
            state=take.choice("state", STATES),
            terms=take.small("terms", TERMS_BYTES) or {},
            init_hash=take.text("init_hash", _HEX),
            epoch=take.count("epoch"),
            batch=take.count("batch"),
            step=take.count("step", at_least=1),
            pace=take.count("pace"),
            generation=take.count("generation"),
            leader=take.count("leader"),
            proposal=None if inner is None else Proposal._from(inner),
        )
        same_place(post, run, peer)
        generation = 0 if post.proposal is None else post.proposal.generation
        if max(post.epoch, post.batch, post.step, post.pace, post.generation, generation) > FAR:
            raise Refused("format", f"meeting.json: a position, pace or generation beyond {FAR}")
        return post


def to_words(document: bytes) -> list[int]:
    """A document as the integers that a peer's workers can share; always `WORDS` of them."""
    padded = len(document).to_bytes(8, "big") + document
    padded += bytes(8 * WORDS - len(padded))
    return [int.from_bytes(padded[at : at + 8], "big", signed=True) for at in range(0, len(padded), 8)]


def from_words(words: list[int]) -> bytes:
    """The document that `to_words` made `words` of."""
    padded = b"".join(word.to_bytes(8, "big", signed=True) for word in words)
    return padded[8 : 8 + int.from_bytes(padded[:8], "big")]


WORDS = 1024


def plain_terms(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Terms as they come out of JSON, so that both sides of a comparison have been through it."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(terms)))
    return plain
