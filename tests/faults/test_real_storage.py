"""Storage that really misbehaves, under a real exchange of two peers: S3 over HTTP, and folders.

Every case: the fault fired; training went on while it lasted, with the last good peer and finite parameters; it was
counted under a named cause; and the exchange resumed, with the same objects, when it was over.
"""

# ruff: noqa: F401, F811 (fixtures are imported, and then named as arguments)

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.exchange.errors import StorageError
from codistill.exchange.objects import CHUNK, Objects
from tests.fixtures_peers import RUN, Peer, peers, quick_exchange, until
from tests.fixtures_store import (
    CREDENTIALS,
    S3Server,
    answer_with,
    conditional,
    cut_short,
    hang,
    reading,
    refuse,
    reset_in_the_middle,
    s3_server,
    s3_url,
    writing,
)

ROOT = Path(__file__).resolve().parents[2]
FOREVER = 10**9  # updates; how long a snapshot stays in use is not the question here


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests, with all their retries, end after a second instead of a minute."""
    monkeypatch.setitem(Objects.__init__.__kwdefaults__, "timeout", 1.0)


class Pair:
    """Two peers that train side by side in this process, each with an exchange of its own."""

    def __init__(self, make: Callable[..., Peer], **options: Any) -> None:
        self.peers = [make(number, max_staleness=FOREVER, **options) for number in (0, 1)]

    @classmethod
    def exchanging(cls, make: Callable[..., Peer], **options: Any) -> Pair:
        """Two peers that have taken up each other's snapshots."""
        pair = cls(make, **options)
        pair.train(lambda: min(pair.used()) > 0)
        return pair

    def train(self, condition: Callable[[], Any]) -> None:
        """Both train until something has happened, and at least once."""
        for _ in range(3000):
            for peer in self.peers:
                peer.step()
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError(f"what was waited for did not happen; incidents: {self.causes()}")

    def used(self) -> list[int]:
        """The update of the other's snapshot that each has in use; -1 for none."""
        states = [peer.codistiller.state_dict()["in_use"] for peer in self.peers]
        return [next((used["update"] for used in state.values()), -1) for state in states]

    def causes(self) -> dict[str, int]:
        """Incidents of both, by cause."""
        counts: dict[str, int] = {}
        for peer in self.peers:
            for cause, count in peer.causes().items():
                counts[cause] = counts.get(cause, 0) + count
        return counts

    def resumes(self) -> None:
        """Both take up a snapshot of an update from now on."""
        now = max(peer.update for peer in self.peers)
        self.train(lambda: min(self.used()) > now)
        assert all(torch.isfinite(value).all() for peer in self.peers for value in peer.model.state_dict().values())

    def survives(self, cause: str = "storage") -> None:
        """While the trouble lasts: it is counted for both, and after that they train on with what they had."""
        before = [peer.causes().get(cause, 0) for peer in self.peers]
        self.train(lambda: all(peer.causes().get(cause, 0) > n for peer, n in zip(self.peers, before, strict=True)))
        for peer in self.peers:
            peer.step(10)
            assert peer.metrics()["peers"] == 1
            assert peer.codistiller.active
        assert set(self.causes()) <= {cause, "pruned"}


OUTAGES: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "throttled": (refuse("503 Slow Down", "SlowDown", Retry_After="1"), lambda request: True),
    "internal errors": (refuse("500 Internal Server Error", "InternalError"), lambda request: True),
    "credentials expired": (refuse("403 Forbidden", "ExpiredToken"), lambda request: True),
    "nothing answers": (hang, lambda request: True),
    "writing is forbidden": (refuse("403 Forbidden", "AccessDenied"), writing()),
    "bodies are cut short": (cut_short, reading()),
    "bodies are reset": (reset_in_the_middle, reading()),
}


class TestS3:
    @pytest.mark.parametrize("outage", list(OUTAGES))
    def test_an_outage_is_survived_and_the_exchange_resumes(
        self, peers, s3_server: S3Server, s3_url, impatient, caplog, outage
    ):
        pair = Pair.exchanging(peers, dir=s3_url)
        with s3_server.trouble(*OUTAGES[outage]) as trouble:
            pair.survives()
        assert trouble.fired > 2
        pair.resumes()
        assert not any(secret in caplog.text for secret in CREDENTIALS.values())

    def test_a_short_throttling_is_waited_out_and_is_no_incident(self, peers, s3_server, s3_url):
        pair = Pair.exchanging(peers, dir=s3_url)
        with s3_server.trouble(refuse("503 Slow Down", "SlowDown", Retry_After="1"), times=6) as trouble:
            pair.train(lambda: trouble.fired == 6)
            pair.resumes()
        assert pair.causes() == {}

    def test_updates_are_made_while_the_store_hangs(self, peers, s3_server, s3_url):
        """With the default timeouts: what the background waits for is neither answered nor given up meanwhile."""
        pair = Pair.exchanging(peers, dir=s3_url)

        def read_or_written(request):
            return reading("/latest.json")(request) or writing(".safetensors")(request)

        with s3_server.trouble(hang, where=read_or_written) as trouble:
            pair.train(lambda: trouble.fired == 4)  # each of the two fetchers, each of the two publishers
            for peer in pair.peers:
                peer.step(4)  # what had been fetched by then is taken up
            before = [peer.metrics() for peer in pair.peers]
            for peer in pair.peers:
                peer.step(50)
            assert trouble.fired == 4
            for peer, then in zip(pair.peers, before, strict=True):
                assert peer.codistiller.active
                assert peer.metrics()["staleness"] == then["staleness"] + 50
                assert peer.metrics()["skipped"] == then["skipped"] + 25
        pair.resumes()

    def test_a_bucket_that_vanishes_and_comes_back_empty(self, peers, s3_server, s3_url, impatient):
        pair = Pair.exchanging(peers, dir=s3_url)
        client, bucket = s3_server.client(), s3_url.split("/")[2]
        until(lambda: _removed(client, bucket))
        pair.survives()
        client.create_bucket(Bucket=bucket)
        pair.resumes()

    def test_a_payload_pruned_while_it_is_read_makes_way_for_the_next(self, peers, s3_server, s3_url):
        pair = Pair.exchanging(peers, dir=s3_url)
        pruned = []

        def prune(trouble, request, honest):
            _, bucket, key = request.path.split("/", 2)
            s3_server.client().delete_object(Bucket=bucket, Key=key)
            pruned.append(key)
            return honest()

        def payload(request):
            return request.method == "GET" and request.path.endswith(".safetensors")

        before = pair.used()
        with s3_server.trouble(prune, where=payload, times=1):
            pair.train(lambda: pruned)
            pair.resumes()
        assert set(pair.causes()) == {"pruned"}
        assert min(pair.used()) > max(before)

    def test_a_server_without_conditional_puts_is_good_enough(self, peers, s3_server, s3_url, impatient, caplog):
        with s3_server.trouble(refuse("501 Not Implemented", "NotImplemented"), where=conditional) as trouble:
            pair = Pair.exchanging(peers, dir=s3_url)
            asked = trouble.fired
            pair.resumes()
            assert trouble.fired == asked > 0, "it is not tried again"
        told = [record.getMessage() for record in caplog.records if "conditional puts" in record.getMessage()]
        assert len(told) == len(pair.peers)

    def test_an_older_answer_after_a_newer_one_is_refused_as_a_rollback(self, peers, s3_server, s3_url):
        pair = Pair.exchanging(peers, dir=s3_url)
        _, _, bucket, prefix = s3_url.split("/", 3)
        key = f"{prefix}/{RUN}/peers/1/latest.json"
        older = s3_server.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        pair.resumes()
        newest = pair.used()
        with s3_server.trouble(answer_with(older), where=reading("/peers/1/latest.json")) as trouble:
            pair.train(lambda: "rollback" in pair.peers[0].causes())
            for peer in pair.peers:
                peer.step(10)
            assert pair.used()[0] >= newest[0]
        assert trouble.fired > 0
        assert pair.causes() == {"rollback": 1}
        pair.resumes()

    def test_peers_that_start_during_an_outage_join_when_it_is_over(self, peers, s3_server, s3_url, impatient):
        with s3_server.trouble(refuse("503 Slow Down", "SlowDown")) as trouble:
            pair = Pair(peers, dir=s3_url)
            for peer in pair.peers:
                peer.step(10)
                assert peer.causes()["storage"] > 0
                assert not peer.codistiller.active
        assert trouble.fired > 2
        pair.resumes()

    def test_an_outage_for_the_whole_length_changes_not_one_bit(self, peers, s3_server, s3_url, impatient):
        alone = peers(0, dir="", peers=1, save_dir="alone")
        alone.step(30)
        with s3_server.trouble(refuse("503 Slow Down", "SlowDown")) as trouble:
            peer = peers(0, dir=s3_url)
            peer.step(30)
            until(lambda: peer.causes().get("storage", 0) > 1)
        assert trouble.fired > 2
        assert peer.losses == alone.losses
        for name, value in alone.model.state_dict().items():
            assert torch.equal(value, peer.model.state_dict()[name]), name

    def test_a_put_killed_in_the_middle_leaves_no_object_but_an_upload_for_the_lifecycle_rule(self, s3_server, s3_url):
        _, _, bucket, prefix = s3_url.split("/", 3)
        client = s3_server.client()
        with s3_server.trouble(hang, where=lambda request: "partNumber=2" in str(request.query_string)) as trouble:
            process = _start(f"Objects({s3_url!r}).put('run/big', bytes({CHUNK + 1}))")
            _kill_when(process, lambda: trouble.fired)
        objects = Objects(s3_url)
        assert not objects.exists("run/big")
        assert objects.sweep("run", set()) == 0
        [upload] = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
        assert upload["Key"] == f"{prefix}/run/big"
        objects.put("run/big", bytes(CHUNK + 1))
        assert objects.exists("run/big")

    def test_a_put_that_fails_in_the_middle_takes_its_upload_back(self, s3_server, s3_url):
        objects, bucket = Objects(s3_url, timeout=5), s3_url.split("/")[2]
        second = refuse("403 Forbidden", "ExpiredToken")
        with (
            s3_server.trouble(second, where=lambda request: "partNumber=2" in str(request.query_string)) as trouble,
            pytest.raises(StorageError, match="ExpiredToken"),
        ):
            objects.put("run/big", bytes(CHUNK + 1))
        assert trouble.fired == 1
        assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket)


class TestFolder:
    def test_a_full_disk_is_survived_and_leaves_no_remains(self, disk, peers):
        pair = Pair.exchanging(peers)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        pair.survives()
        filler.unlink()
        pair.resumes()
        for peer in pair.peers:
            peer.codistiller.close()
        assert list(disk.rglob("*#*")) == []

    def test_a_read_only_folder_is_survived(self, disk, peers):
        pair = Pair.exchanging(peers)
        _mount("-o", "remount,ro", str(disk))
        pair.survives()
        _mount("-o", "remount,rw", str(disk))
        pair.resumes()

    def test_a_folder_that_denies_permission_is_survived(self, peers, tmp_path):
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        pair = Pair.exchanging(peers)
        folders = [folder for folder, _, _ in os.walk(tmp_path / "store")]
        for folder in folders:
            os.chmod(folder, 0o555)
        try:
            pair.survives()
        finally:
            for folder in folders:
                os.chmod(folder, 0o755)
        pair.resumes()

    def test_a_machine_without_room_for_a_snapshot_keeps_no_half_of_it(self, disk, tmp_path):
        objects = Objects(str(tmp_path / "elsewhere"))
        objects.put("key", bytes(2**22))
        with pytest.raises(OSError, match="No space left on device"):
            objects.download("key", disk / "file", size=2**22)
        assert list(disk.iterdir()) == []
        objects.put("key", bytes(2**20))
        assert objects.download("key", disk / "file", size=2**20)

    def test_a_folder_that_vanishes_and_comes_back_is_survived(self, peers, tmp_path):
        pair = Pair.exchanging(peers)
        store = tmp_path / "store"
        store.rename(tmp_path / "moved")
        until(lambda: _made_a_file(store))
        pair.survives()
        until(lambda: _took_its_place(tmp_path / "moved", store))
        pair.resumes()

    def test_a_folder_that_was_removed_is_made_again(self, peers, tmp_path):
        pair = Pair.exchanging(peers)
        (tmp_path / "store").rename(tmp_path / "moved")
        pair.resumes()
        assert (tmp_path / "store" / RUN / "peers").is_dir()

    def test_what_a_killed_put_leaves_is_swept_by_the_next_start(self, peers, tmp_path):
        first = peers(0)
        first.step(1)
        first.codistiller.close()
        folder = tmp_path / "store" / RUN / "peers" / "0" / "1"
        key = f"{RUN}/peers/0/1/2-a1b2c3d4.safetensors"
        process = _start(f"Objects({str(tmp_path / 'store')!r}).put({key!r}, bytes(2**29))")
        _kill_when(process, lambda: list(folder.glob("*#*")))
        [left] = folder.iterdir()
        assert left.name == "2-a1b2c3d4.safetensors#1"
        assert left.stat().st_size < 2**29
        second = peers(0)
        second.step_until(lambda: not left.exists())
        assert second.causes() == {}
        assert list((folder.parent / "2").glob("*.safetensors"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB where the peers' store will be."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder = tmp_path / "store"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    """Mount, or remount as soon as no file is being written."""

    def mounted() -> bool:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0

    until(mounted)


def _made_a_file(path: Path) -> bool:
    """Put a file where a folder was, unless a peer makes the folder again in between."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(FileExistsError):
        path.touch(exist_ok=False)
    return path.is_file()


def _took_its_place(folder: Path, path: Path) -> bool:
    """Put a folder where a file was, unless a peer makes a folder there in between."""
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        folder.rename(path)
    return not folder.exists()


def _removed(client: Any, bucket: str) -> bool:
    """Empty and remove a bucket, unless somebody writes in between."""
    for found in client.list_objects_v2(Bucket=bucket).get("Contents", []):
        client.delete_object(Bucket=bucket, Key=found["Key"])
    try:
        client.delete_bucket(Bucket=bucket)
    except client.exceptions.ClientError:
        return False
    return True


def _start(code: str) -> subprocess.Popen[bytes]:
    code = f"from codistill.exchange.objects import Objects\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})


def _kill_when(process: subprocess.Popen[bytes], condition: Callable[[], Any]) -> None:
    try:
        while not condition():
            assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -9
