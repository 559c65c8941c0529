"""The keys of format 1, and what may happen to each.

Everything but `latest.json` and `meeting.json` is written once and never again under that name; a payload stands before
its manifest, and both before the `latest.json` that names them, so that whoever reads a name finds what it promises or,
after pruning, nothing. Only `sweep` lists. What is read is verified down to the payload's digest; what it means is for
the caller. Failures are `StorageError`, contents that are not acceptable are `Refused`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from codistill.config import RUN_ID
from codistill.exchange import strict_json
from codistill.exchange.errors import Refused, StorageError
from codistill.exchange.manifest import (
    FORMAT,
    LATEST_BYTES,
    MANIFEST_BYTES,
    MOST,
    Latest,
    Manifest,
    Reference,
    same_place,
)
from codistill.exchange.objects import Objects
from codistill.text import printable


class RunStore:
    """One run's documents and payloads.

    Args:
        objects: Where they are kept.
        run: Run identifier: letters, digits, `.`, `_`, `-`, at most 128, the first a letter or digit.
        key: What manifests are signed with. With one, a manifest without its signature is not read: Refused
            ("signature") comes from `latest` and `manifest`.

    Raises:
        ValueError: For a run identifier that cannot be part of a key.
    """

    def __init__(self, objects: Objects, run: str, key: Optional[bytes] = None) -> None:
        if not RUN_ID.fullmatch(run):
            raise ValueError(f"run id {run!r} must match {RUN_ID.pattern}")
        self.objects = objects
        self.run = run
        self._key = key

    def agree(self, terms: Mapping[str, Any]) -> None:
        """Write what all peers must agree on, or compare with what the first peer wrote.

        Args:
            terms: JSON values by name.

        Raises:
            Refused: "terms", naming the first term that differs; "run" or "format" when the document is not ours.
        """
        key = f"{self.run}/run.json"
        mine = strict_json.dumps({"format": FORMAT, "run": self.run, "terms": dict(terms)})
        if self.objects.create(key, mine):
            return
        theirs = self.terms()
        if theirs is None:
            raise StorageError("storage", f"{key} exists but cannot be read")
        compare_terms(self.run, theirs, strict_json.loads(mine)["terms"])

    def terms(self) -> Optional[dict[str, Any]]:
        """Return what all peers have agreed on, or None when there is no such run.

        Raises:
            Refused: "run", "size" or "format" when the document is not ours.
        """
        key = f"{self.run}/run.json"
        data = self.objects.get(key, limit=MANIFEST_BYTES)
        if data is None:
            return None
        found = strict_json.loads(data)
        if found.keys() != {"format", "run", "terms"} or found["format"] != FORMAT:
            raise Refused("format", f"{key} is not of format {FORMAT}")
        if found["run"] != self.run or not isinstance(found["terms"], dict):
            raise Refused("run", f"{key} does not describe run {self.run}")
        terms: dict[str, Any] = found["terms"]
        return terms

    def claim(self, peer: int, token: str, above: int = 0) -> int:
        """Take the peer's next incarnation, from 1; of several that try at once each gets one of its own.

        Args:
            peer: Number of the peer.
            token: Digest of the owner's secret, to be seen by others.
            above: The number must be larger than this one, whatever the store remembers.
        """
        try:
            latest = self.latest(peer)
        except Refused:  # a spoilt latest.json must not keep its owner from replacing it
            latest = None
        known = latest.incarnation if latest is not None and latest.incarnation < MOST else 0
        incarnation = self.newest_claim(peer, max(above, known)) + 1
        while not self.objects.create(self._claim(peer, incarnation), strict_json.dumps({"token": token})):
            incarnation += 1
        return incarnation

    def newest_claim(self, peer: int, known: int) -> int:
        """Return the highest incarnation that was claimed, at least `known`."""
        while self.objects.exists(self._claim(peer, known + 1)):
            known += 1
        return known

    def latest(self, peer: int) -> Optional[Latest]:
        """Return the peer's newest word, or None when it has not spoken yet."""
        data = self.objects.get(f"{self._peer(peer)}/latest.json", limit=LATEST_BYTES)
        if data is None:
            return None
        latest = Latest.parse(data)
        same_place(latest, self.run, peer)
        if self._key is not None and latest.manifest is not None:
            latest.manifest.check_signature(self._key)
        return latest

    def put_latest(self, latest: Latest) -> None:
        """Overwrite the peer's newest word in one put; its manifest is signed here."""
        if latest.manifest is not None:
            latest = replace(latest, manifest=self._signed(latest.manifest))
        self.objects.put(f"{self._peer(latest.peer)}/latest.json", latest.to_json())

    def put_meeting(self, peer: int, document: bytes) -> None:
        """Overwrite in one put what the peer says to those it exchanges predictions with."""
        self.objects.put(f"{self._peer(peer)}/meeting.json", document)

    def meeting(self, peer: int) -> Optional[bytes]:
        """Return what the peer says to those it exchanges predictions with, unread; None while it says nothing."""
        return self.objects.get(f"{self._peer(peer)}/meeting.json", limit=MANIFEST_BYTES)

    def put_snapshot(self, manifest: Manifest, payload: Any) -> None:
        """Write the payload (bytes-like), then its manifest, signed here; fine to do again after a failure.

        Raises:
            Refused: "exists" when another manifest has this one's name.
        """
        key, document = self._manifest(manifest.peer, manifest.reference), self._signed(manifest).to_json()
        # Payloads have names that nobody else uses: what is there already is this one, from an earlier attempt.
        self.objects.create(self._payload(manifest), payload)
        if not self.objects.create(key, document) and self.objects.get(key, limit=MANIFEST_BYTES) != document:
            self.objects.delete([self._payload(manifest)])
            raise Refused("exists", f"{key} is there already")

    def manifest(self, peer: int, reference: Reference) -> Optional[Manifest]:
        """Return a snapshot's manifest, or None when it was pruned."""
        key = self._manifest(peer, reference)
        data = self.objects.get(key, limit=MANIFEST_BYTES)
        if data is None:
            return None
        manifest = Manifest.parse(data)
        same_place(manifest, self.run, peer)
        if manifest.reference != reference:
            raise Refused("format", f"{key} is the manifest of another snapshot")
        if self._key is not None:
            manifest.check_signature(self._key)
        return manifest

    def download(self, manifest: Manifest, path: Path) -> bool:
        """Fetch a payload into a file and check its size and digest.

        Returns:
            False when the payload is absent: its owner has pruned it.

        Raises:
            Refused: "size" or "hash"; no file is left then.
        """
        key = self._payload(manifest)
        digest = self.objects.download(key, path, size=manifest.bytes)
        if digest is not None and digest != manifest.sha256:
            path.unlink(missing_ok=True)
            raise Refused("hash", f"{key} does not have the digest that its manifest says")
        return digest is not None

    def size(self, manifest: Manifest) -> Optional[int]:
        """Return the bytes that a payload has on the store, or None when it is absent."""
        return self.objects.size(self._payload(manifest))

    def delete(self, peer: int, references: Iterable[Reference]) -> None:
        """Delete snapshots, each payload before the manifest that names it; absent ones are fine."""
        for reference in references:
            try:
                manifest = self.manifest(peer, reference)
            except Refused:  # nobody can use it; its payload's name is not to be believed
                manifest = None
            if manifest is not None:
                self.objects.delete([self._payload(manifest)])
            self.objects.delete([self._manifest(peer, reference)])

    def discard(self, manifest: Manifest) -> None:
        """Delete what an attempt to write this snapshot may have left."""
        self.objects.delete([self._payload(manifest), self._manifest(manifest.peer, manifest.reference)])

    def sweep(self, peer: int, incarnations: Iterable[int], retained: Iterable[Reference]) -> None:
        """Delete what killed predecessors left half-written: everything of `incarnations` that is not `retained`."""
        keep = set()
        for reference in retained:
            keep.add(self._manifest(peer, reference))
            with suppress(Refused):  # nobody can use it; its payload's name is not to be believed
                manifest = self.manifest(peer, reference)
                keep |= {self._payload(manifest)} if manifest is not None else set()
        for incarnation in incarnations:
            self.objects.sweep(self._folder(peer, incarnation), keep)

    def _signed(self, manifest: Manifest) -> Manifest:
        return manifest if self._key is None else manifest.signed(self._key)

    def _payload(self, manifest: Manifest) -> str:
        return f"{self._folder(manifest.peer, manifest.incarnation)}/{manifest.payload}"

    def _peer(self, peer: int) -> str:
        return f"{self.run}/peers/{peer}"

    def _claim(self, peer: int, incarnation: int) -> str:
        return f"{self._peer(peer)}/claims/{incarnation}.json"

    def _folder(self, peer: int, incarnation: int) -> str:
        return f"{self._peer(peer)}/{incarnation}"

    def _manifest(self, peer: int, reference: Reference) -> str:
        return f"{self._folder(peer, reference.incarnation)}/{reference.update}.json"


def compare_terms(run: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise `Refused` ("terms"), naming the first term that differs, unless both are the same."""
    for name in sorted(theirs.keys() | mine.keys()):
        there, here = (
            json.dumps(terms[name], sort_keys=True) if name in terms else "nothing" for terms in (theirs, mine)
        )
        if there != here:
            if isinstance(theirs.get(name), str) and isinstance(mine.get(name), str):
                there, here = there[1:-1], here[1:-1]  # two texts differ without their quotes
            message = f"run {run} was started with {name:.60}={there:.120}, not {here:.120}"
            raise Refused("terms", printable(message))
