"""The store's contract, the same for a folder, memory, S3 and a store that can be made to fail."""

# ruff: noqa: F401, F811 (fixtures are imported, and then named as arguments)

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest
from obstore.store import MemoryStore

from codistill.config import SCHEMES
from codistill.exchange import objects as objects_module
from codistill.exchange import strict_json
from codistill.exchange.errors import Refused, StorageError
from codistill.exchange.manifest import LATEST_BYTES, Reference
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
from tests.fixtures_store import (
    CREDENTIALS,
    FailingObjects,
    S3Server,
    failing_objects,
    folder_objects,
    make_latest,
    make_manifest,
    memory_objects,
    objects,
    s3_objects,
    s3_server,
    s3_url,
)

PAYLOAD = bytes(range(256)) * 5
REFERENCE = Reference(incarnation=1, update=100, sequence=1)


@pytest.fixture
def store(objects: Objects) -> RunStore:
    return RunStore(objects, "run")


class TestObjectsContract:
    def test_what_was_put_is_read_back_and_a_second_put_replaces_it(self, objects):
        for data in (b"first", bytearray(b"second"), memoryview(b"the third one"), b""):
            objects.put("a/b.json", data)
            assert objects.get("a/b.json", limit=64) == bytes(data)

    def test_an_absent_key_reads_as_none(self, objects, tmp_path):
        assert objects.get("a/nothing", limit=64) is None
        assert not objects.exists("a/nothing")
        assert objects.download("a/nothing", tmp_path / "file", size=3) is None
        assert not (tmp_path / "file").exists()

    def test_only_the_first_create_of_a_name_succeeds(self, objects):
        assert objects.create("once", b"mine")
        assert not objects.create("once", b"yours")
        assert objects.get("once", limit=64) == b"mine"

    def test_a_large_object_is_created_once_too(self, objects, tmp_path, monkeypatch):
        # Above S3's least part of 5 MiB, so that parts really are parts.
        monkeypatch.setattr(objects_module, "CHUNK", 5 * 2**20)
        large = PAYLOAD * 9000
        assert objects.create("large", memoryview(large))
        assert not objects.create("large", large)
        digest = objects.download("large", tmp_path / "large", size=len(large))
        assert digest == hashlib.sha256(large).hexdigest()
        assert (tmp_path / "large").read_bytes() == large

    def test_a_caller_may_reuse_its_buffer_after_a_put(self, objects):
        buffer = bytearray(b"before")
        objects.put("put", buffer)
        objects.create("create", memoryview(buffer))
        buffer[:] = b"after!"
        assert objects.get("put", limit=64) == objects.get("create", limit=64) == b"before"

    def test_an_object_beyond_the_limit_is_refused(self, objects):
        objects.put("key", b"12345")
        assert objects.get("key", limit=5) == b"12345"
        with pytest.raises(Refused, match="key: 5 bytes, 4 are allowed") as caught:
            objects.get("key", limit=4)
        assert caught.value.cause == "size"

    def test_a_download_is_written_in_full_with_its_digest(self, objects, tmp_path, monkeypatch):
        objects.put("key", PAYLOAD)
        monkeypatch.setattr(objects_module, "CHUNK", 100)
        assert objects.download("key", tmp_path / "file", size=len(PAYLOAD)) == hashlib.sha256(PAYLOAD).hexdigest()
        assert (tmp_path / "file").read_bytes() == PAYLOAD

    @pytest.mark.parametrize("lie", [-1, 1, 10**11])
    def test_a_download_of_another_size_is_refused_without_a_byte_written(self, objects, tmp_path, lie):
        objects.put("key", PAYLOAD)
        with pytest.raises(Refused) as caught:
            objects.download("key", tmp_path / "file", size=len(PAYLOAD) + lie)
        assert caught.value.cause == "size"
        assert not (tmp_path / "file").exists()

    def test_deleting_takes_absent_keys_as_done(self, objects):
        objects.put("a", b"a")
        objects.put("b", b"b")
        objects.delete(["nothing", "a", "nothing/else", "b"])
        assert objects.get("a", limit=1) is None
        assert objects.get("b", limit=1) is None


class TestRunStoreContract:
    def test_peers_with_the_same_terms_agree_in_any_order(self, store):
        store.agree({"interval": 50, "loss": "kl"})
        store.agree({"loss": "kl", "interval": 50})

    @pytest.mark.parametrize(
        ("terms", "message"),
        [
            ({"interval": 100, "loss": "kl"}, "run run was started with interval=50, not 100"),
            ({"interval": 50, "loss": "mse"}, "run run was started with loss=kl, not mse"),
            ({"interval": 50}, 'run run was started with loss="kl", not nothing'),
            ({"interval": 50, "loss": "kl", "sync": True}, "run run was started with sync=nothing, not true"),
            ({"interval": "50", "loss": "kl"}, 'run run was started with interval=50, not "50"'),
        ],
    )
    def test_another_term_is_refused_by_name(self, store, terms, message):
        store.agree({"interval": 50, "loss": "kl"})
        with pytest.raises(Refused) as caught:
            store.agree(terms)
        assert (caught.value.cause, str(caught.value)) == ("terms", message)

    def test_each_start_claims_the_next_incarnation(self, store):
        assert [store.claim(3, "token") for _ in range(3)] == [1, 2, 3]
        assert store.claim(4, "token") == 1
        assert store.newest_claim(3, 0) == store.newest_claim(3, 2) == store.newest_claim(3, 3) == 3
        assert store.newest_claim(5, 0) == 0

    def test_a_claim_starts_from_the_incarnation_last_heard_of(self, store):
        store.put_latest(make_latest(incarnation=7))
        assert store.claim(0, "token") == 8

    def test_a_spoilt_latest_does_not_keep_its_owner_out(self, store):
        store.objects.put("run/peers/0/latest.json", b"spoilt")
        assert store.claim(0, "token") == 1

    def test_claims_at_the_same_time_get_different_incarnations(self, store):
        together = threading.Barrier(6)

        def claim(_: int) -> int:
            together.wait()
            return store.claim(0, "token")

        with ThreadPoolExecutor(6) as pool:
            assert sorted(pool.map(claim, range(6))) == [1, 2, 3, 4, 5, 6]

    def test_latest_comes_back_as_it_was_put(self, store):
        assert store.latest(0) is None
        for heartbeat in (1, 2):
            latest = make_latest(make_manifest(), heartbeat=heartbeat, retained=(REFERENCE,))
            store.put_latest(latest)
            assert store.latest(0) == latest

    @pytest.mark.parametrize(("changes", "cause"), [({"run": "other"}, "run"), ({"peer": 1}, "peer")])
    def test_a_document_copied_to_another_place_is_refused(self, store, changes, cause):
        store.objects.put("run/peers/0/latest.json", make_latest(**changes).to_json())
        store.objects.put("run/peers/0/1/100.json", make_manifest(**changes).to_json())
        with pytest.raises(Refused) as caught:
            store.latest(0)
        assert caught.value.cause == cause
        with pytest.raises(Refused) as caught:
            store.manifest(0, REFERENCE)
        assert caught.value.cause == cause

    def test_a_latest_beyond_its_cap_is_refused(self, store):
        store.objects.put("run/peers/0/latest.json", b" " * (LATEST_BYTES + 1))
        with pytest.raises(Refused) as caught:
            store.latest(0)
        assert caught.value.cause == "size"

    def test_a_snapshot_comes_back_with_its_payload(self, store, tmp_path):
        manifest = make_manifest(PAYLOAD)
        store.put_snapshot(manifest, memoryview(PAYLOAD))
        assert store.manifest(0, REFERENCE) == manifest
        assert store.download(manifest, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == PAYLOAD

    def test_a_snapshot_lies_under_the_frozen_keys(self, store):
        store.agree({"interval": 50})
        store.claim(0, "token")
        store.put_snapshot(make_manifest(PAYLOAD), PAYLOAD)
        store.put_latest(make_latest())
        for key in (
            "run/run.json",
            "run/peers/0/claims/1.json",
            "run/peers/0/1/100-a1b2c3d4.safetensors",
            "run/peers/0/1/100.json",
            "run/peers/0/latest.json",
        ):
            assert store.objects.exists(key), key
        agreed = strict_json.loads(store.objects.get("run/run.json", limit=1000))
        assert agreed == {"format": 1, "run": "run", "terms": {"interval": 50}}

    def test_a_name_is_never_used_twice(self, store, tmp_path):
        first = make_manifest(PAYLOAD)
        store.put_snapshot(first, PAYLOAD)
        again = make_manifest(b"other", payload="100-eeeeeeee.safetensors")
        with pytest.raises(Refused) as caught:
            store.put_snapshot(again, b"other")
        assert caught.value.cause == "exists"
        assert store.manifest(0, REFERENCE) == first
        assert store.download(first, tmp_path / "file")
        assert not store.objects.exists("run/peers/0/1/100-eeeeeeee.safetensors")

    def test_writing_a_snapshot_again_after_a_failure_completes_it(self, store, tmp_path):
        manifest = make_manifest(PAYLOAD)
        for _ in range(2):
            store.put_snapshot(manifest, PAYLOAD)
            assert store.manifest(0, REFERENCE) == manifest
            assert store.download(manifest, tmp_path / "file")

    @pytest.mark.parametrize("bit", [0, 1000, 8 * len(PAYLOAD) - 1])
    def test_a_payload_with_one_flipped_bit_is_refused(self, store, tmp_path, bit):
        flipped = bytearray(PAYLOAD)
        flipped[bit // 8] ^= 1 << bit % 8
        store.put_snapshot(make_manifest(PAYLOAD), flipped)
        with pytest.raises(Refused) as caught:
            store.download(make_manifest(PAYLOAD), tmp_path / "file")
        assert caught.value.cause == "hash"
        assert not (tmp_path / "file").exists()

    def test_a_payload_of_another_size_is_refused(self, store, tmp_path):
        store.put_snapshot(make_manifest(PAYLOAD), PAYLOAD[:-1])
        with pytest.raises(Refused) as caught:
            store.download(make_manifest(PAYLOAD), tmp_path / "file")
        assert caught.value.cause == "size"

    def test_a_manifest_of_another_snapshot_is_refused(self, store):
        store.objects.put("run/peers/0/1/100.json", make_manifest(sequence=2).to_json())
        with pytest.raises(Refused) as caught:
            store.manifest(0, REFERENCE)
        assert caught.value.cause == "format"

    def test_a_pruned_snapshot_is_absent_and_can_be_pruned_again(self, store, tmp_path):
        manifest = make_manifest(PAYLOAD)
        store.put_snapshot(manifest, PAYLOAD)
        for _ in range(2):
            store.delete(0, [REFERENCE])
            assert store.manifest(0, REFERENCE) is None
            assert not store.download(manifest, tmp_path / "file")

    def test_an_unreadable_manifest_can_be_pruned(self, store):
        store.objects.put("run/peers/0/1/100.json", b"{")
        store.delete(0, [REFERENCE])
        assert store.manifest(0, REFERENCE) is None


class TestFailures:
    def test_a_put_that_fails_leaves_no_manifest_for_the_payload(self, failing_objects):
        store = RunStore(failing_objects, "run")
        for nth in (1, 2):
            manifest = make_manifest(PAYLOAD, payload=f"100-{nth:08d}.safetensors")
            failing_objects.fail_at("create", nth)
            with pytest.raises(StorageError, match="create fails on purpose"):
                store.put_snapshot(manifest, PAYLOAD)
            assert failing_objects.fired == ["create"] * nth
            assert store.manifest(0, REFERENCE) is None
        store.put_snapshot(make_manifest(PAYLOAD), PAYLOAD)

    def test_a_claim_whose_answer_was_lost_is_not_given_again(self, failing_objects):
        store = RunStore(failing_objects, "run")
        failing_objects.fail_at("create", answer_lost=True)
        with pytest.raises(StorageError):
            store.claim(0, "token")
        assert failing_objects.fired == ["create"]
        assert store.claim(0, "token") == 2

    def test_pruning_that_stops_half_way_is_finished_by_the_next(self, failing_objects):
        store = RunStore(failing_objects, "run")
        store.put_snapshot(make_manifest(PAYLOAD), PAYLOAD)
        failing_objects.fail_at("delete", 2)
        with pytest.raises(StorageError):
            store.delete(0, [REFERENCE])
        assert failing_objects.fired == ["delete"]
        assert store.manifest(0, REFERENCE) is not None
        store.delete(0, [REFERENCE])
        assert store.manifest(0, REFERENCE) is None

    @pytest.mark.parametrize("operation", ["get", "exists", "download", "put", "create", "delete"])
    def test_a_store_that_cannot_be_reached_is_one_line_without_secrets(
        self,
        s3_server: S3Server,
        s3_url,
        tmp_path,
        operation,
    ):
        objects = Objects(s3_url.replace("s3://", "s3://user:password@") + "?signature=sesame", timeout=2)
        arguments = {"get": {"limit": 9}, "download": {"path": tmp_path / "file", "size": 9}}.get(operation, {})
        data = [b"data"] if operation in ("put", "create") else []
        s3_server.fail_next(100, "500 Broken")
        try:
            with pytest.raises(StorageError) as caught:
                getattr(objects, operation)(*([["a/key"]] if operation == "delete" else ["a/key", *data]), **arguments)
            assert s3_server.failed > 0
        finally:
            s3_server.fail_next(0)
        message = str(caught.value)
        assert caught.value.cause == "storage"
        assert f"{s3_url}/a/key failed: " in message
        assert "\n" not in message
        for secret in (*CREDENTIALS.values(), "password", "sesame"):
            assert secret not in message

    def test_a_short_outage_is_waited_out(self, s3_server: S3Server, s3_objects):
        s3_server.fail_next(2)
        s3_objects.put("key", b"data")
        assert s3_server.failed == 2
        assert s3_objects.get("key", limit=9) == b"data"

    def test_writing_to_a_bucket_that_does_not_exist_is_a_storage_error(self, s3_url):
        objects = Objects("s3://there-is-no-such-bucket", timeout=2)
        for write in (objects.put, objects.create):
            with pytest.raises(StorageError, match="writing s3://there-is-no-such-bucket/key failed: "):
                write("key", b"data")

    def test_a_place_that_cannot_be_written_is_not_mistaken_for_an_absent_object(self, folder_objects, tmp_path):
        folder_objects.put("key", PAYLOAD)
        for path in (tmp_path / "missing" / "file", tmp_path):
            with pytest.raises(OSError, match=f"'{path}'"):
                folder_objects.download("key", path, size=len(PAYLOAD))
        assert tmp_path.is_dir()

    def test_a_download_that_breaks_half_way_leaves_no_file(self, s3_server, s3_url, tmp_path, monkeypatch):
        objects = Objects(s3_url, timeout=0.5)
        objects.put("key", PAYLOAD)
        monkeypatch.setattr(objects_module, "CHUNK", 1000)
        read = Objects._range

        def then_break(self, key, start, length):
            chunk = read(self, key, start, length)
            s3_server.fail_next(100)
            return chunk

        monkeypatch.setattr(Objects, "_range", then_break)
        try:
            with pytest.raises(StorageError):
                objects.download("key", tmp_path / "file", size=len(PAYLOAD))
            assert s3_server.failed > 0
        finally:
            s3_server.fail_next(0)
        assert not (tmp_path / "file").exists()

    def test_an_object_that_vanishes_half_way_is_absent(self, folder_objects, tmp_path, monkeypatch):
        folder_objects.put("key", PAYLOAD)
        monkeypatch.setattr(objects_module, "CHUNK", 1000)
        read = Objects._range

        def then_delete(self, key, start, length):
            chunk = read(self, key, start, length)
            folder_objects.delete([key])
            return chunk

        monkeypatch.setattr(Objects, "_range", then_delete)
        assert folder_objects.download("key", tmp_path / "file", size=len(PAYLOAD)) is None
        assert not (tmp_path / "file").exists()

    def test_an_object_that_shrinks_on_the_way_is_refused(self, folder_objects, tmp_path, monkeypatch):
        folder_objects.put("key", PAYLOAD)
        monkeypatch.setattr(Objects, "size", lambda *_: len(PAYLOAD) + 1)
        with pytest.raises(Refused) as caught:
            folder_objects.download("key", tmp_path / "file", size=len(PAYLOAD) + 1)
        assert caught.value.cause == "size"
        assert not (tmp_path / "file").exists()

    def test_a_panic_inside_the_library_is_a_storage_error_and_an_interrupt_is_not(self, memory_objects, monkeypatch):
        panic = type("PanicException", (BaseException,), {})

        def raising(error):
            def get(*_):
                raise error("at line 1")

            return get

        monkeypatch.setattr(obstore, "get", raising(panic))
        with pytest.raises(StorageError, match="reading MemoryStore/key failed: at line 1"):
            memory_objects.get("key", limit=1)
        monkeypatch.setattr(obstore, "get", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            memory_objects.get("key", limit=1)


class TestOpening:
    @pytest.mark.parametrize(
        "name",
        ["plain", "with space", "per%20cent", "ha#sh", "quest?ion", "uml\N{LATIN SMALL LETTER U WITH DIAERESIS}t"],
    )
    def test_a_path_and_its_file_url_are_the_same_folder(self, tmp_path, name):
        by_path, by_url = Objects(str(tmp_path / name)), Objects((tmp_path / name).as_uri())
        by_path.put("a/key", b"data")
        assert (tmp_path / name / "a" / "key").read_bytes() == b"data"
        assert by_url.get("a/key", limit=9) == b"data"

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("ftp://host/x", "opening ftp://host/x failed: unknown scheme; known are a folder and file, s3, gs, az"),
            ("file://a/b", "opening file://a/b failed: a file URL has three slashes: file:///folder"),
        ],
    )
    def test_a_url_that_means_nothing_is_one_clear_line(self, url, message):
        with pytest.raises(StorageError) as caught:
            Objects(url)
        assert str(caught.value) == message

    def test_a_file_where_the_folder_should_be_is_a_storage_error(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StorageError, match=r"(opening|writing) .*/file"):
            Objects(str(tmp_path / "file")).put("key", b"data")

    @pytest.mark.parametrize(
        "run",
        ["", ".", "..", "a/b", "-a", "_a", ".hidden", "a" * 129, "a\n", "\N{LATIN SMALL LETTER U WITH DIAERESIS}"],
    )
    def test_a_run_id_that_cannot_be_part_of_a_key_is_refused(self, run):
        with pytest.raises(ValueError, match="run id"):
            RunStore(Objects.over(MemoryStore()), run)

    def test_the_known_schemes_are_frozen(self):
        assert SCHEMES == ("file", "s3", "gs", "az")


def test_faults_fire_where_they_were_armed_and_once(failing_objects: FailingObjects):
    failing_objects.put("key", b"1")
    failing_objects.fail_at("put", 2)
    failing_objects.put("key", b"2")
    with pytest.raises(StorageError):
        failing_objects.put("key", b"3")
    assert failing_objects.get("key", limit=1) == b"2"
    failing_objects.put("key", b"4")
    assert failing_objects.fired == ["put"]
