"""The keys of format 1, and what may happen to each.

Everything but `latest.json` is written once and never again under that name; a payload stands before its manifest,
and both before the `latest.json` that names them, so that whoever reads a name finds what it promises or, after
pruning, nothing. No operation lists. What is read is verified down to the payload's digest; what it means is for the
caller. Failures are `StorageError`, contents that are not acceptable are `Refused`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from codistill.exchange import strict_json
from codistill.exchange.errors import Refused, StorageError
from codistill.exchange.manifest import (
    FORMAT,
    LATEST_BYTES,
    MANIFEST_BYTES,
    RUN_ID,
    Latest,
    Manifest,
    Reference,
    same_place,
)
from codistill.exchange.objects import Objects


class RunStore:
    """One run's documents and payloads.

    Args:
        objects: Where they are kept.
        run: Run identifier: letters, digits, `.`, `_`, `-`, at most 128, not starting with `.` or `-`.

    Raises:
        ValueError: For a run identifier that cannot be part of a key.
    """

    def __init__(self, objects: Objects, run: str) -> None:
        if not RUN_ID.fullmatch(run):
            raise ValueError(f"run id {run!r} must match {RUN_ID.pattern}")
        self.objects = objects
        self.run = run

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
        data = self.objects.get(key, limit=MANIFEST_BYTES)
        if data is None:
            raise StorageError("storage", f"{key} exists but cannot be read")
        theirs = strict_json.loads(data)
        if theirs.keys() != {"format", "run", "terms"} or theirs["format"] != FORMAT:
            raise Refused("format", f"{key} is not of format {FORMAT}")
        if theirs["run"] != self.run or not isinstance(theirs["terms"], dict):
            raise Refused("run", f"{key} does not describe run {self.run}")
        _compare(self.run, theirs["terms"], strict_json.loads(mine)["terms"])

    def claim(self, peer: int, token: str) -> int:
        """Take the peer's next incarnation, from 1; of several that try at once each gets one of its own.

        Args:
            peer: Number of the peer.
            token: Digest of the owner's secret, to be seen by others.
        """
        try:
            latest = self.latest(peer)
        except Refused:  # a spoilt latest.json must not keep its owner from replacing it
            latest = None
        incarnation = self.newest_claim(peer, latest.incarnation if latest else 0) + 1
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
        return latest

    def put_latest(self, latest: Latest) -> None:
        """Overwrite the peer's newest word in one put."""
        self.objects.put(f"{self._peer(latest.peer)}/latest.json", latest.to_json())

    def put_snapshot(self, manifest: Manifest, payload: Any) -> None:
        """Write the payload (bytes-like), then its manifest; Refused("exists") when either name is taken."""
        folder = self._folder(manifest.peer, manifest.incarnation)
        if not self.objects.create(f"{folder}/{manifest.payload}", payload):
            raise Refused("exists", f"{folder}/{manifest.payload} is there already")
        if not self.objects.create(f"{folder}/{manifest.update}.json", manifest.to_json()):
            self.objects.delete([f"{folder}/{manifest.payload}"])
            raise Refused("exists", f"{folder}/{manifest.update}.json is there already")

    def manifest(self, peer: int, reference: Reference) -> Optional[Manifest]:
        """Return a snapshot's manifest, or None when it was pruned."""
        key = self._manifest(peer, reference)
        data = self.objects.get(key, limit=MANIFEST_BYTES)
        if data is None:
            return None
        manifest = Manifest.parse(data)
        same_place(manifest, self.run, peer)
        if Reference(manifest.incarnation, manifest.update, manifest.sequence) != reference:
            raise Refused("format", f"{key} is the manifest of another snapshot")
        return manifest

    def download(self, manifest: Manifest, path: Path) -> bool:
        """Fetch a payload into a file and check its size and digest.

        Returns:
            False when the payload is absent: its owner has pruned it.

        Raises:
            Refused: "size" or "hash"; no file is left then.
        """
        key = f"{self._folder(manifest.peer, manifest.incarnation)}/{manifest.payload}"
        digest = self.objects.download(key, path, size=manifest.bytes)
        if digest is not None and digest != manifest.sha256:
            path.unlink(missing_ok=True)
            raise Refused("hash", f"{key} does not have the digest that its manifest says")
        return digest is not None

    def delete(self, peer: int, references: Iterable[Reference]) -> None:
        """Delete snapshots, each payload before the manifest that names it; absent ones are fine."""
        for reference in references:
            try:
                manifest = self.manifest(peer, reference)
            except Refused:  # nobody can use it; its payload's name is not to be believed
                manifest = None
            if manifest is not None:
                self.objects.delete([f"{self._folder(peer, reference.incarnation)}/{manifest.payload}"])
            self.objects.delete([self._manifest(peer, reference)])

    def _peer(self, peer: int) -> str:
        return f"{self.run}/peers/{peer}"

    def _claim(self, peer: int, incarnation: int) -> str:
        return f"{self._peer(peer)}/claims/{incarnation}.json"

    def _folder(self, peer: int, incarnation: int) -> str:
        return f"{self._peer(peer)}/{incarnation}"

    def _manifest(self, peer: int, reference: Reference) -> str:
        return f"{self._folder(peer, reference.incarnation)}/{reference.update}.json"


def _compare(run: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for name in sorted(theirs.keys() | mine.keys()):
        there, here = (
            json.dumps(terms[name], sort_keys=True) if name in terms else "nothing" for terms in (theirs, mine)
        )
        if there != here:
            if isinstance(theirs.get(name), str) and isinstance(mine.get(name), str):
                there, here = theirs[name], mine[name]  # two texts differ without their quotes
            raise Refused("terms", f"run {run} was started with {name}={there:.120}, not {here:.120}")
