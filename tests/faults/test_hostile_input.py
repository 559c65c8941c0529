"""Hostile things in place of what a peer published: refused, counted by a named cause, and survived.

Everything is read by the fetcher that a training has, from a real folder or S3. `assert_survived` is what every case
ends in: the last good snapshot is still in use, nothing else lies on this machine, and the next good one is taken up.
What single documents may hold is judged in the tests of `strict_json`, `manifest` and `snapshot`.
"""

# ruff: noqa: F401, F811 (fixtures are imported, and then named as arguments)

import hashlib
import json
import math
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.exchange.checkpoint import fetcher as fetcher_module
from codistill.exchange.checkpoint.fetcher import NEWEST, Fetcher, Wish, snapshot_file
from codistill.exchange.errors import Refused
from codistill.exchange.manifest import LATEST_BYTES, MANIFEST_BYTES, MOST, Manifest, Reference
from codistill.exchange.objects import Objects
from codistill.exchange.snapshot import HostBuffer, Template
from codistill.exchange.store import RunStore
from codistill.meters import Incidents
from tests.fixtures_peers import RUN, Tiny, Writer, identity, like, peers, publishers, quick_exchange, until, weights
from tests.fixtures_store import (
    FailingObjects,
    folder_objects,
    make_latest,
    make_manifest,
    memory_objects,
    s3_objects,
    s3_server,
    s3_url,
)

ROOT = Path(__file__).resolve().parents[2]
HUGE = 100 * 10**9
LATEST = f"{RUN}/peers/1/latest.json"
FOLDER = f"{RUN}/peers/1/1"


def snapshot(state: dict[str, torch.Tensor]) -> bytes:
    """A whole safetensors file."""
    buffer = HostBuffer(state, "float32")
    buffer.fill(state)
    return bytes(buffer.view())


def header_of(data: bytes) -> tuple[bytes, bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start], data[start:]


def with_header(text: bytes, payload: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + payload


GOOD, NEXT, AFTER = weights(1), weights(2), weights(3)
BYTES = snapshot(NEXT)
HEADER, PAYLOAD = header_of(BYTES)


def truth(payload: bytes) -> dict[str, Any]:
    """What an honest manifest says of a payload."""
    return {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


@dataclass
class Scene:
    """A reader that uses a good snapshot of peer 1, and a way to everything that peer has on the store."""

    fetcher: Fetcher
    incidents: Incidents
    machine: Path  # where verified snapshots lie
    objects: FailingObjects
    writer: Writer
    root: Path | None  # of the store, if it is a folder
    outside: Path  # a folder that nobody was told about
    good: Manifest | None = None

    def file(self, key: str) -> Path:
        assert self.root is not None, "only a folder has files"
        return self.root / key

    def announce_next(self, payload: bytes, **changes: Any) -> Manifest:
        """A snapshot whose manifest tells the truth about any bytes at all, unless `changes` say otherwise."""
        update = changes.pop("update", 20 + 10 * self.writer.sequence)
        manifest = self.writer.snapshot(NEXT, update, payload=payload, **{**truth(payload), **changes})
        self.writer.announce(manifest)
        return manifest

    def put_latest(self, data: bytes) -> None:
        self.objects.put(LATEST, data)

    def announce_changed(self, **changes: Any) -> None:
        """An honest snapshot, of which `latest.json` says something else."""
        manifest = self.writer.snapshot(NEXT, 20)
        place = {"peer": 1, "run": RUN, "heartbeat": 1000, "retained": self.writer.retained}
        plain = json.loads(make_latest(manifest, **place).to_json())
        plain["manifest"] |= changes
        self.put_latest(json.dumps(plain).encode())

    def look_again(self, times: int = 3) -> None:
        """Wait until the store was asked `times` more."""
        enough = self.objects.calls["get"] + times
        until(lambda: self.objects.calls["get"] >= enough)

    def assert_refused(self, cause: str, *, once: bool = True) -> None:
        """Wait for the refusal; no other cause is counted, and a snapshot's own but once."""
        until(lambda: self.incidents.total)
        self.look_again()
        assert set(self.incidents.counts) == {cause}
        assert not once or self.incidents.total == 1

    def assert_survived(self) -> None:
        """The last good snapshot is in use, alone on this machine, and the next good one replaces it."""
        assert self.fetcher.found(1) == self.good
        assert self.good is not None
        good = snapshot_file(self.machine, self.good.sha256)
        assert set(self.machine.iterdir()) == {good, good.with_suffix(".json")}
        self.read(GOOD)
        self.writer.sequence += 1
        after = self.writer.publish(AFTER, 10**6)
        until(lambda: self.fetcher.found(1) == after)
        self.read(AFTER)

    def read(self, expected: dict[str, torch.Tensor]) -> None:
        found = self.fetcher.found(1)
        assert found is not None
        tensors = Template(GOOD, "float32").open(snapshot_file(self.machine, found.sha256))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


@pytest.fixture
def make_scene(tmp_path: Path, quick_exchange: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scene]]:
    """Makes scenes over any store, whose readers are not patient, and ends their threads."""
    monkeypatch.setattr(fetcher_module, "POLL_SECONDS", 0.002)
    monkeypatch.setattr(fetcher_module, "PATIENCE", 1)
    made: list[Scene] = []

    def make(objects: Objects, root: Path | None = None) -> Scene:
        machine, outside = tmp_path / f"snapshots{len(made)}", tmp_path / "outside"
        machine.mkdir()
        outside.mkdir(exist_ok=True)
        watched, incidents = FailingObjects(objects), Incidents(fatal=False)
        store = RunStore(watched, RUN)
        template = Template(GOOD, "float32")
        fetcher = Fetcher(store, machine, [1, 2], like(template), "float32", identity(0), incidents)
        scene = Scene(fetcher, incidents, machine, watched, Writer(store), root, outside)
        made.append(scene)
        fetcher.start()
        scene.good = scene.writer.publish(GOOD, 10)
        fetcher.wish(1, NEWEST)
        until(lambda: fetcher.found(1))
        return scene

    yield make
    for scene in made:
        scene.fetcher.close(5)


@pytest.fixture
def scene(make_scene: Callable[..., Scene], folder_objects: Objects, tmp_path: Path) -> Scene:
    """A scene over a local folder."""
    return make_scene(folder_objects, tmp_path / "store")


@pytest.fixture(params=["folder", "s3"])
def any_scene(request: pytest.FixtureRequest, make_scene: Callable[..., Scene]) -> Scene:
    """A scene over a local folder, then over S3."""
    if request.param == "folder":
        return request.getfixturevalue("scene")
    return make_scene(request.getfixturevalue("s3_objects"))


class Marker:
    """Pickles into something that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def bombs(room: int) -> dict[str, bytes]:
    """JSON objects of nearly `room` bytes that would cost a careless reader far more."""
    return {
        "deep lists": b'{"a":' + b"[" * (room // 2 - 9) + b"]" * (room // 2 - 9) + b"}",
        "deep objects": b'{"a":' * (room // 6 - 9) + b"0" + b"}" * (room // 6 - 9),
        "never closed": b'{"a":' + b"[" * (room - 9),
        "empty lists": b'{"a":[' + b"[]," * (room // 3 - 9) + b"[]]}",
        "empty objects": b'{"a":[' + b"{}," * (room // 3 - 9) + b"{}]}",
        "many keys": b"{" + b",".join(b'"%d":0' % i for i in range(room // 11)) + b"}",
        "one key again and again": b"{" + b'"a":{},' * (room // 7 - 9) + b'"a":0}',
        "a long string": b'{"a":"' + b"x" * (room - 99) + b'"}',
        "a string of 4 bytes a letter": b'{"a":"\xf0\x9f\x92\xa9' + b"x" * (room - 99) + b'"}',
        "a long number": b'{"a":' + b"9" * (room - 99) + b"}",
        "a long fraction": b'{"a":0.' + b"9" * (room - 99) + b"}",
        "a long exponent": b'{"a":1e' + b"9" * (room - 99) + b"}",
        "many escapes": b'{"a":"' + b"\\u0000" * (room // 6 - 9) + b'"}',
    }


# The others are no JSON that means one thing, or none that fits its place.
TOO_MANY_VALUES = (
    "deep lists",
    "deep objects",
    "never closed",
    "empty lists",
    "empty objects",
    "one key again and again",
)


def bombed(room: int) -> dict[str, tuple[str, bytes]]:
    """The bombs for a document, each with the cause for which it is refused."""
    causes = {what: "size" if what in TOO_MANY_VALUES else "format" for what in bombs(room)}
    return {f"a bomb: {what}": (causes[what], bomb) for what, bomb in bombs(room).items()}


HEADER_CAUSES = {
    "a long string": "names",
    "a string of 4 bytes a letter": "names",
    "many escapes": "names",
    "a long fraction": "names",
    "a long number": "format",
    "a long exponent": "format",
}
TWICE = with_header(HEADER.strip()[:-1] + b"," + HEADER.strip()[1:], PAYLOAD)
LONG = BYTES.replace(b"[88,116]", b"[88,999]")  # as long as before
OTHER_DTYPE = snapshot({**NEXT, "b": NEXT["b"].int()})
OTHER_SHAPE = snapshot({**NEXT, "c": NEXT["c"].view(7, 1)})

# By name: the cause, the payload, and in what its manifest does not tell the truth about it.
SNAPSHOTS: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "nothing but a length": ("format", BYTES[:8], {}),
    "a header that claims 100 GB": ("format", HUGE.to_bytes(8, "little") + BYTES[8:], {}),
    "a header that claims 2**64 - 1 bytes": ("format", b"\xff" * 8 + BYTES[8:], {}),
    "a header longer than the file": ("format", len(BYTES).to_bytes(8, "little") + BYTES[8:], {}),
    "a header that says everything twice": ("format", TWICE, {}),
    "a header that claims a longer tensor": ("format", LONG, {}),
    "more payload than the header says": ("format", BYTES + bytes(64), {}),
    "a manifest": ("format", Manifest.to_json(make_manifest()), {}),
    "zeroes": ("format", bytes(len(BYTES)), {}),
    "another dtype under the right manifest": ("dtype", OTHER_DTYPE, {}),
    "another shape": ("shape", OTHER_SHAPE, {}),
    "no tensors": ("names", snapshot({}), {}),
    "the weights of another model": ("names", snapshot({"theirs": torch.ones(40)}), {}),
    "another vocabulary": ("fingerprint", BYTES, {"fingerprint": "e" * 64}),
    "another precision": ("dtype", BYTES, {"dtype": "bfloat16"}),
    "a NaN": ("non-finite", snapshot({**NEXT, "c": NEXT["c"] * float("nan")}), {}),
    "an infinity": ("non-finite", snapshot({**NEXT, "a": NEXT["a"] / 0}), {}),
    "a manifest that claims 100 GB": ("size", BYTES, {"bytes": HUGE}),
    "a manifest that claims 2**62 bytes": ("size", BYTES, {"bytes": MOST}),
    "a manifest that claims nothing": ("size", BYTES, {"bytes": 0}),
    "a manifest with another digest": ("hash", BYTES, {"sha256": "0" * 64}),
    "a sequence from the future": ("hash", BYTES, {"sha256": "0" * 64, "sequence": MOST}),
    "an incarnation from the future": ("hash", BYTES, {"sha256": "0" * 64, "incarnation": MOST}),
    "an update from the future": ("hash", BYTES, {"sha256": "0" * 64, "update": MOST}),
}


@pytest.mark.parametrize("what", SNAPSHOTS)
def test_a_hostile_snapshot_is_refused_once_by_name(scene, what):
    cause, payload, lies = SNAPSHOTS[what]
    scene.announce_next(payload, **lies)
    scene.assert_refused(cause)
    scene.assert_survived()


@pytest.mark.parametrize("what", ["a header that claims 100 GB", "a manifest that claims 100 GB", "a NaN"])
def test_a_hostile_snapshot_is_refused_from_s3_too(make_scene, s3_objects, what):
    cause, payload, lies = SNAPSHOTS[what]
    scene = make_scene(s3_objects)
    scene.announce_next(payload, **lies)
    scene.assert_refused(cause)
    scene.assert_survived()


@pytest.mark.parametrize("what", bombs(100))
def test_a_bomb_for_a_header_is_refused_once(scene, what):
    scene.announce_next(with_header(bombs(60_000)[what], PAYLOAD))
    scene.assert_refused(HEADER_CAUSES.get(what, "size"))
    scene.assert_survived()


def test_a_file_cut_anywhere_is_refused_each_time_though_its_manifest_agrees(scene):
    structure = {at + side for at, byte in enumerate(BYTES[:200]) if chr(byte) in '{}[]:,"' for side in (0, 1)}
    tensors = {len(BYTES) - len(PAYLOAD) + end for end in (0, 40, 88)}
    draw = random.Random(1)
    for count, cut in enumerate(sorted({*range(9), *structure, *tensors, *draw.sample(range(len(BYTES)), 20)}), 1):
        scene.announce_next(BYTES[:cut])
        until(lambda count=count: scene.incidents.total == count)
    assert set(scene.incidents.counts) == {"size", "format"}
    assert scene.incidents.counts["size"] == 8  # shorter than a length
    scene.assert_survived()


def test_a_bit_flipped_anywhere_in_a_payload_is_refused_each_time(any_scene):
    draw = random.Random(2)
    for count in range(1, 31):
        flipped = bytearray(BYTES)
        bit = draw.randrange(8 * len(BYTES))
        flipped[bit // 8] ^= 1 << bit % 8
        any_scene.announce_next(bytes(flipped), sha256=hashlib.sha256(BYTES).hexdigest())
        until(lambda count=count: any_scene.incidents.total == count)
    assert any_scene.incidents.counts == {"hash": 30}
    any_scene.assert_survived()


def test_a_bit_flipped_anywhere_in_latest_never_brings_other_weights(scene):
    honest = scene.writer.announce(scene.writer.snapshot(NEXT, 20)).to_json()
    until(lambda: scene.fetcher.found(1) != scene.good)
    draw = random.Random(3)
    taken = set()
    for bit in draw.sample(range(8 * len(honest)), 150):
        flipped = bytearray(honest)
        flipped[bit // 8] ^= 1 << bit % 8
        scene.put_latest(bytes(flipped))
        scene.look_again(2)
        taken.add(scene.fetcher.found(1).sha256)
    assert scene.incidents.total > 50
    assert taken == {hashlib.sha256(BYTES).hexdigest()}
    scene.read(NEXT)


LATESTS: dict[str, tuple[str, bytes]] = {
    "nothing": ("format", b""),
    "zeroes": ("format", bytes(500)),
    "a page of HTML": ("format", b"<!DOCTYPE html><html><body>Sign in</body></html>"),
    "a snapshot": ("format", BYTES),
    "a list": ("format", b"[]"),
    "another encoding": ("format", make_latest(peer=1).to_json().decode().encode("utf-16")),
    "a key twice": ("format", make_latest(peer=1).to_json()[:-1] + b',"peer":1}'),
    "a later format": ("format", make_latest(peer=1).to_json().replace(b'"format":1', b'"format":2')),
    "a manifest of a later format": (
        "format",
        make_latest(make_manifest(peer=1), peer=1).to_json().replace(b'"format":1,"hmac"', b'"format":2,"hmac"'),
    ),
    "another run": ("run", make_latest(peer=1, run="other").to_json()),
    "another peer": ("peer", make_latest(peer=2).to_json()),
    "a manifest of another run": ("run", make_latest(make_manifest(peer=1, run="other"), peer=1).to_json()),
    "a manifest of another peer": ("peer", make_latest(make_manifest(peer=0), peer=1).to_json()),
    "one byte too many": ("size", b" " * (LATEST_BYTES + 1)),
    **bombed(LATEST_BYTES),
}


@pytest.mark.parametrize("what", LATESTS)
def test_a_hostile_latest_is_refused_by_name(scene, what):
    cause, data = LATESTS[what]
    scene.put_latest(data)
    scene.assert_refused(cause, once=False)
    scene.assert_survived()


@pytest.mark.parametrize("what", ["a page of HTML", "another run", "a bomb: empty objects", "one byte too many"])
def test_a_hostile_latest_is_refused_from_s3_too(make_scene, s3_objects, what):
    cause, data = LATESTS[what]
    scene = make_scene(s3_objects)
    scene.put_latest(data)
    scene.assert_refused(cause, once=False)
    scene.assert_survived()


@pytest.mark.parametrize(
    "payload",
    [
        "../../../outside/20-aaaa.safetensors",
        "20-../../../outside/aaaa.safetensors",
        "/etc/hostname",
        "file:///etc/hostname",
        "20-%2e%2e%2faaaa.safetensors",
        "20-aaaa.safetensors/../../../../outside/x",
        "20-aaaa\\..\\x.safetensors",
        "20-aaaa.safetensors\0.json",
        "20-aaaa#1.safetensors",
        "20-aaaa?versionId=1.safetensors",
        "20-\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}\N{DIVISION SLASH}.safetensors",
        "20-\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT ONE}1.safetensors",
        f"20-{'a' * 65}.safetensors",
        "20.json",
        "latest.json",
        "",
    ],
)
def test_a_payload_by_another_name_than_its_own_is_never_looked_for(scene, payload):
    before = scene.objects.calls["download"]
    scene.announce_changed(payload=payload)
    scene.assert_refused("format", once=False)
    assert scene.objects.calls["download"] == before
    scene.assert_survived()


MANIFESTS: dict[str, tuple[str, bytes]] = {
    "nothing": ("format", b""),
    "its payload": ("format", BYTES),
    "another snapshot's": ("format", make_manifest(peer=1, update=20, sequence=7).to_json()),
    "another peer's": ("peer", make_manifest(peer=2, update=20, sequence=2).to_json()),
    "another run's": ("run", make_manifest(peer=1, run="other", update=20, sequence=2).to_json()),
    "one byte too many": ("size", b" " * (MANIFEST_BYTES + 1)),
    **bombed(MANIFEST_BYTES),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_hostile_manifest_is_refused_and_nobody_waits_for_its_snapshot(scene, what):
    cause, data = MANIFESTS[what]
    wanted = scene.writer.snapshot(NEXT, 20)
    scene.objects.put(f"{FOLDER}/20.json", data)
    scene.fetcher.wish(1, Wish(reference=Reference(1, 20, wanted.sequence)))
    until(lambda: scene.fetcher.hopeless(1))
    scene.assert_refused(cause, once=False)
    scene.fetcher.wish(1, NEWEST)
    until(lambda: scene.fetcher.found(1))
    scene.assert_survived()


@pytest.mark.parametrize("place", ["payload", "manifest", "latest"])
def test_nothing_is_unpickled_wherever_it_stands(scene, place):
    marker = scene.outside / "loaded"
    torch.save({**NEXT, "x": Marker(marker)}, saved := scene.outside / "saved")
    for data in (pickle.dumps(Marker(marker)), pickle.dumps(Marker(marker), 0), saved.read_bytes()):
        before = scene.incidents.total
        if place == "payload":
            scene.announce_next(data)
        elif place == "latest":
            scene.put_latest(data)
        else:
            scene.objects.put(f"{FOLDER}/10.json", data)
            scene.fetcher.wish(1, Wish(reference=Reference(1, 10, 1)))
        until(lambda before=before: scene.incidents.total > before)
    assert not marker.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved)
    pickle.loads(pickle.dumps(Marker(marker)))
    assert marker.exists(), "the marker would not have been noticed"
    assert set(scene.incidents.counts) == {"format"}
    scene.fetcher.wish(1, NEWEST)
    until(lambda: scene.fetcher.found(1))
    scene.assert_survived()


def link_to(target: Path) -> Callable[[Path, Path], None]:
    return lambda path, outside: path.symlink_to(target)


def to_a_copy(path: Path, outside: Path) -> None:
    """What stood there is honest and now lies elsewhere."""
    (outside / "copy").write_bytes(BYTES)
    path.symlink_to(outside / "copy")


def socket_at(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unused:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's whole path must be short
        unused.bind(path.name)
        os.chdir(here)


def sparse(path: Path, outside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


ODD_FILES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "a link to a file": ("format", to_a_copy),
    "a link to nothing": ("format", link_to(Path("nowhere"))),
    "a link to a device without end": ("format", link_to(Path("/dev/zero"))),
    "a link to a folder": ("format", link_to(Path("/"))),
    "a link to a link": ("format", lambda path, outside: path.symlink_to(path)),
    "a pipe": ("format", lambda path, outside: os.mkfifo(path)),
    "a folder": ("format", lambda path, outside: path.mkdir()),
    "a socket": ("format", socket_at),
    "a sparse file of 100 GB": ("size", sparse),
}


@pytest.mark.parametrize("what", ODD_FILES)
def test_a_payload_that_is_not_a_plain_file_is_not_read(scene, what):
    cause, make = ODD_FILES[what]
    manifest = scene.writer.snapshot(NEXT, 20)
    path = scene.file(f"{FOLDER}/{manifest.payload}")
    path.unlink()
    make(path, scene.outside)
    scene.writer.announce(manifest)
    scene.assert_refused(cause)
    scene.assert_survived()


@pytest.mark.parametrize("what", ODD_FILES)
def test_a_latest_that_is_not_a_plain_small_file_is_not_read(scene, what):
    cause, make = ODD_FILES[what]
    path = scene.file(f"{RUN}/peers/2/latest.json")
    path.parent.mkdir()
    make(path, scene.outside)
    scene.fetcher.wish(2, NEWEST)
    scene.assert_refused(cause, once=False)
    path.rmdir() if what == "a folder" else path.unlink()
    scene.assert_survived()
    second = Writer(scene.writer.store, peer=2).publish(NEXT, 10)
    until(lambda: scene.fetcher.found(2) == second)


@pytest.mark.parametrize("place", [f"{RUN}/peers/1", FOLDER])
def test_a_link_where_a_folder_belongs_is_not_followed(scene, place):
    folder = scene.file(place)
    folder.rename(scene.outside / "moved")
    folder.symlink_to(scene.outside / "moved")
    scene.fetcher.wish(1, Wish(reference=Reference(1, 10, 1)))
    scene.assert_refused("format", once=False)
    folder.unlink()
    (scene.outside / "moved").rename(folder)
    scene.fetcher.wish(1, NEWEST)
    until(lambda: scene.fetcher.found(1))
    scene.assert_survived()


def test_odd_names_in_the_folder_disturb_nobody(scene):
    names = [b"a\nb", b"\xff\xfe", b"..json", b"#1", b"latest.json#1", b"x" * 255, b"%2e%2e", b" ", b"\x1b[2J", b"con"]
    for folder in ("", RUN, f"{RUN}/peers", f"{RUN}/peers/1", FOLDER, f"{RUN}/peers/1/claims"):
        scene.file(folder).mkdir(exist_ok=True)
        for number, name in enumerate(names):
            path = os.path.join(os.fsencode(scene.file(folder)), name)
            os.mkdir(path) if number % 2 else os.close(os.open(path, os.O_CREAT))
    scene.look_again()
    scene.assert_survived()
    assert scene.writer.store.claim(1, "a" * 64) == 2
    assert scene.incidents.total == 0


def test_the_files_of_another_run_copied_here_are_refused(scene):
    other = Writer(RunStore(scene.objects, "other"))
    manifest = other.snapshot(NEXT, 20, run="other")
    other.announce(manifest, run="other")
    theirs = scene.file("other/peers/1/latest.json").read_bytes()
    shutil.copytree(scene.file("other/peers/1/1"), scene.file(FOLDER), dirs_exist_ok=True)
    scene.put_latest(theirs)
    scene.assert_refused("run", once=False)
    scene.assert_survived()


def test_a_payload_of_another_run_under_the_expected_name_is_refused(scene):
    manifest = scene.writer.snapshot(NEXT, 20)
    scene.file(f"{FOLDER}/{manifest.payload}").write_bytes(snapshot(weights(99)))
    scene.writer.announce(manifest)
    scene.assert_refused("hash")
    scene.assert_survived()


def test_a_manifest_that_names_a_verified_file_is_judged_like_any_other(scene):
    scene.announce_next(snapshot(GOOD), fingerprint="e" * 64)
    scene.assert_refused("fingerprint")
    scene.assert_survived()


def test_a_peer_cannot_have_the_snapshots_of_another_refused(scene):
    manifest = scene.writer.snapshot(NEXT, 20)
    thief = Writer(scene.writer.store, peer=2)
    scene.fetcher.wish(2, NEWEST)
    thief.publish(NEXT, 20, fingerprint="e" * 64)
    scene.assert_refused("fingerprint")
    scene.writer.announce(manifest)
    until(lambda: scene.fetcher.found(1) == manifest)
    scene.read(NEXT)
    assert scene.fetcher.found(2) is None


def test_the_same_weights_published_again_after_a_damage_are_taken_up(scene):
    scene.announce_next(BYTES[:-1] + b"?", sha256=hashlib.sha256(BYTES).hexdigest())
    scene.assert_refused("hash")
    again = scene.writer.publish(NEXT, 40)
    until(lambda: scene.fetcher.found(1) == again)
    scene.read(NEXT)


@pytest.mark.parametrize("value", [MOST, 2**63 - 1])
@pytest.mark.parametrize("number", ["heartbeat", "incarnation", "resume_floor"])
def test_an_owner_that_comes_back_to_numbers_from_the_future_is_heard_by_the_others(
    memory_objects, publishers, number, value
):
    store = RunStore(memory_objects, RUN)
    hostile = json.loads(make_latest(token="a" * 64).to_json()) | {number: value}
    memory_objects.put(f"{RUN}/peers/0/latest.json", json.dumps(hostile).encode())
    publishers(incidents=(incidents := Incidents(fatal=False)))

    def heard() -> bool:
        try:
            return store.latest(0).manifest is None and store.latest(0).resume_floor == 0
        except Refused:
            return False

    until(heard, 5)
    assert incidents.total == 0


@pytest.mark.parametrize("odd", ["two\nlines", "\x1b[2J", "\x7f", "\N{RIGHT-TO-LEFT OVERRIDE}", "x" * 5000])
def test_terms_that_somebody_else_wrote_are_told_in_one_printable_line(memory_objects, odd):
    for theirs in ({odd: 1}, {"loss": odd}, {"loss": [odd]}):
        document = {"format": 1, "run": RUN, "terms": theirs}
        memory_objects.put(f"{RUN}/run.json", json.dumps(document).encode())
        with pytest.raises(Refused, match="was started with") as caught:
            RunStore(memory_objects, RUN).agree({"loss": "kl"})
        assert caught.value.cause == "terms"
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


THIEF = """
import sys
from pathlib import Path
from codistill import ConfigError
from codistill.exchange.membership import Membership, owner_token
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
folder, save_dir = sys.argv[1], Path(sys.argv[2])
terms = __import__("json").loads(sys.argv[3])
try:
    Membership(RunStore(Objects(folder), "run"), 0, owner_token(save_dir, 0), terms, save_dir).join()
except ConfigError as error:
    sys.exit(str(error))
"""


def test_a_second_process_cannot_take_the_number_of_a_running_peer(peers, tmp_path):
    owner, reader = peers(0), peers(1)
    reader.step_until(lambda: reader.metrics()["peers"] == 1 or owner.step())
    terms = json.dumps(json.loads((tmp_path / "store" / RUN / "run.json").read_bytes())["terms"])
    command = [sys.executable, "-c", THIEF, str(tmp_path / "store"), str(tmp_path / "thief"), terms]
    thief = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert thief.returncode == 1
    assert thief.stderr.strip() == (
        "--codistill-peer 0: a running process with another save dir has this number; "
        "give each peer of the run its own --codistill-peer"
    )
    before = reader.metrics()["received"]
    reader.step_until(lambda: reader.metrics()["received"] > before or owner.step())
    assert (owner.causes(), reader.causes()) == ({}, {})


def test_training_goes_on_through_all_of_it(peers, tmp_path, monkeypatch):
    monkeypatch.setattr(fetcher_module, "PATIENCE", 1)
    reader = peers(0, max_staleness=10**6)

    def in_use() -> str:
        return reader.codistiller.state_dict()["in_use"]["1"]["sha256"]

    writer = Writer(RunStore(FailingObjects(Objects(str(tmp_path / "store"))), RUN))
    good = Tiny().state_dict()
    manifest = writer.publish(good, 10)
    reader.step_until(lambda: reader.metrics()["peers"] == 1)
    for refused, (_, payload, lies) in enumerate(SNAPSHOTS.values()):
        told = {"update": 20 + refused, **truth(payload), **lies}
        writer.announce(writer.snapshot(good, payload=payload, **told))
        reader.step_until(lambda refused=refused: sum(reader.causes().values()) > refused)
    for _, data in LATESTS.values():
        before = sum(reader.causes().values())
        writer.store.objects.put(LATEST, data)
        reader.step_until(lambda before=before: sum(reader.causes().values()) > before)
    assert all(torch.isfinite(value).all() for value in reader.model.state_dict().values())
    assert all(map(math.isfinite, reader.losses))
    assert in_use() == manifest.sha256
    writer.sequence += 1
    after = writer.publish(Tiny().state_dict(), 10**6)
    reader.step_until(lambda: in_use() == after.sha256)


# Reads one run after the other with a fetcher of its own, and prints by how many MiB the process grew meanwhile.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from codistill.exchange.checkpoint import fetcher as module
from codistill.exchange.checkpoint.fetcher import NEWEST, Fetcher
from codistill.exchange.objects import Objects
from codistill.exchange.snapshot import Template
from codistill.exchange.store import RunStore
from codistill.meters import Incidents
from tests.fixtures_peers import identity, like, until, weights
module.POLL_SECONDS = 0.01

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

folder, machine = sys.argv[1], Path(sys.argv[2])
templates = {"large": Template({f"layer.{i}.weight": torch.ones(1) for i in range(5000)}, "float32")}
for run in sys.argv[3:]:
    template = templates.get(run.split("-")[0]) or Template(weights(0), "float32")
    incidents = Incidents(fatal=False)
    (here := machine / run).mkdir(parents=True)
    fetcher = Fetcher(RunStore(Objects(folder), run), here, [1], like(template), "float32", identity(0), incidents)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    fetcher.wish(1, NEWEST)
    fetcher.start()
    until(lambda: incidents.total or fetcher.found(1))
    fetcher.close(20)
    print(json.dumps([run, peak() - before, *incidents.counts]), flush=True)
"""
GROWTH = 24  # MiB: less than twice what a good snapshot of 5,000 tensors needs, a 4,000th of what some claim


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is read from Linux")
def test_whatever_is_read_costs_a_bounded_amount_of_memory(tmp_path):
    objects = Objects(str(tmp_path / "store"))
    runs = []

    def publish(run: str, payload: bytes = BYTES, **lies: Any) -> Path:
        runs.append(run)
        manifest = Writer(RunStore(objects, run)).snapshot(
            NEXT, 20, payload=payload, run=run, **{**truth(payload), **lies}
        )
        Writer(RunStore(objects, run)).announce(manifest, run=run)
        return tmp_path / "store" / run / "peers" / "1" / "1" / manifest.payload

    publish("good")
    large = {f"layer.{i}.weight": torch.ones(1) for i in range(5000)}
    publish("large", snapshot(large))
    for number in range(len(bombs(100))):
        publish(f"latest-{number}")
        objects.put(f"latest-{number}/peers/1/latest.json", list(bombs(LATEST_BYTES).values())[number])
        publish(f"header-{number}", with_header(list(bombs(60_000).values())[number], PAYLOAD))
        publish(f"large-{number}", with_header(list(bombs(800_000).values())[number], bytes(20_000)))
    publish("header-of-15-MiB", with_header(bombs(15 * 2**20)["empty objects"], PAYLOAD))
    publish("claimed-in-the-header", HUGE.to_bytes(8, "little") + BYTES[8:])
    os.truncate(publish("sparse-payload", bytes=HUGE), HUGE)
    os.truncate(publish("sparse-behind-a-true-manifest"), HUGE)
    os.truncate(publish("sparse-latest").parents[1] / "latest.json", HUGE)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "store"), str(tmp_path / "machine"), *runs]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    measured = {run: (growth, causes) for run, growth, *causes in map(json.loads, ended.stdout.splitlines())}
    assert measured.keys() == set(runs), ended.stderr
    assert {run for run, (_, causes) in measured.items() if not causes} == {"good", "large"}
    assert {cause for _, causes in measured.values() for cause in causes} <= {"size", "format", "names"}
    assert {run: growth for run, (growth, _) in measured.items() if growth > GROWTH} == {}
