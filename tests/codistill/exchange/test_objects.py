"""Objects where stores differ or misbehave: odd things in a folder, no conditional puts, remains, outages, secrets."""

# ruff: noqa: F401, F811 (fixtures are imported, and then named as arguments)

import base64
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import quote

import pytest
from werkzeug.wrappers import Response

from codistill.exchange.errors import Refused, StorageError
from codistill.exchange.objects import CHUNK, Objects
from tests.fixtures_store import (
    CREDENTIALS,
    S3Server,
    conditional,
    cut_short,
    failing_objects,
    folder_objects,
    hang,
    ignore_condition,
    memory_objects,
    objects,
    reading,
    refuse,
    reset_in_the_middle,
    s3_objects,
    s3_server,
    s3_url,
    writing,
)

PAYLOAD = bytes(range(256)) * 40


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a device")
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # /dev/null


def _link(path: Path) -> None:
    (path.parent.parent / "elsewhere").write_bytes(b"not ours")
    path.symlink_to(path.parent.parent / "elsewhere")


ODD: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": _socket,
    "a device": _device,
    "a symbolic link": _link,
    "a symbolic link to nothing": lambda path: path.symlink_to("nothing"),
}
OPERATIONS: dict[str, Callable[[Objects, str, Path], object]] = {
    "get": lambda objects, key, file: objects.get(key, limit=99),
    "exists": lambda objects, key, file: objects.exists(key),
    "size": lambda objects, key, file: objects.size(key),
    "download": lambda objects, key, file: objects.download(key, file, size=4),
    "put": lambda objects, key, file: objects.put(key, b"data"),
    "create": lambda objects, key, file: objects.create(key, b"data"),
    "delete": lambda objects, key, file: objects.delete([key]),
}
OUTAGES = [("503 Slow Down", "SlowDown"), ("429 Too Many Requests", ""), ("500 Internal Server Error", "InternalError")]


@pytest.fixture(params=list(OPERATIONS))
def operation(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Objects, str], object]:
    return lambda objects, key: in_time(lambda: OPERATIONS[request.param](objects, key, tmp_path / "downloaded"))


def in_time(call: Callable[[], object]) -> object:
    """What `call` gives, in a thread of its own: nothing can interrupt obstore where it opens a pipe."""
    outcome: Future[object] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome.result(20)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "codistill"]


class TestWhatIsNoFile:
    @pytest.mark.parametrize("kind", list(ODD))
    def test_it_is_refused_before_it_is_opened_and_stays(self, folder_objects, tmp_path, operation, kind):
        there = tmp_path / "store" / "key"
        ODD[kind](there)
        before = there.lstat()
        with pytest.raises(Refused) as caught:
            operation(folder_objects, "key")
        expected = (
            f"{there.parent.resolve() / 'key'}: {kind.removesuffix(' to nothing')} where a file belongs; remove it"
        )
        assert (caught.value.cause, str(caught.value)) == ("format", expected)
        assert (there.lstat().st_ino, there.lstat().st_mode) == (before.st_ino, before.st_mode)
        if kind == "a symbolic link":
            assert (tmp_path / "elsewhere").read_bytes() == b"not ours"

    @pytest.mark.parametrize("key", ["link/key", "link/deeper/key", "folder/link/key"])
    def test_a_link_on_the_way_leads_nowhere(self, folder_objects, tmp_path, operation, key):
        (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
        (tmp_path / "elsewhere" / "key").write_bytes(b"not ours")
        link = tmp_path / "store" / key[: key.index("link") + 4]
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(Refused) as caught:
            operation(folder_objects, key)
        assert str(caught.value).endswith(
            f"{link.relative_to(tmp_path)}: a symbolic link where a folder belongs; remove it"
        )
        assert sorted(path.name for path in (tmp_path / "elsewhere").rglob("*")) == ["deeper", "key"]
        assert (tmp_path / "elsewhere" / "key").read_bytes() == b"not ours"

    def test_a_file_on_the_way_is_refused(self, folder_objects, operation):
        folder_objects.put("file", b"data")
        with pytest.raises(Refused, match="file: a file where a folder belongs; remove it"):
            operation(folder_objects, "file/key")

    def test_it_works_again_once_the_thing_is_gone(self, folder_objects, tmp_path):
        os.mkfifo(tmp_path / "store" / "key")
        with pytest.raises(Refused):
            folder_objects.put("key", b"data")
        (tmp_path / "store" / "key").unlink()
        folder_objects.put("key", b"data")
        assert folder_objects.get("key", limit=9) == b"data"

    @pytest.mark.parametrize("scheme", ["", "file://"])
    def test_the_folder_itself_and_those_above_it_may_be_links(self, tmp_path, scheme):
        (tmp_path / "real" / "store").mkdir(parents=True)
        (tmp_path / "above").symlink_to("real")
        (tmp_path / "real" / "root").symlink_to("store")
        objects = Objects(f"{scheme}{tmp_path}/above/root")
        objects.put("a/key", b"data")
        assert objects.get("a/key", limit=9) == b"data"
        assert (tmp_path / "real" / "store" / "a" / "key").read_bytes() == b"data"
        assert objects.sweep("a", set()) == 1

    def test_a_link_that_is_turned_after_the_start_changes_nothing(self, tmp_path):
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
        (tmp_path / "root").symlink_to("first")
        objects = Objects(str(tmp_path / "root"))
        (tmp_path / "root").unlink()
        (tmp_path / "root").symlink_to("second")
        (tmp_path / "first" / "odd").mkdir()
        with pytest.raises(Refused, match="first/odd: a folder where a file belongs"):
            objects.get("odd", limit=9)
        objects.put("key", b"data")
        assert (tmp_path / "first" / "key").read_bytes() == b"data"
        assert objects.sweep("", set()) == 1
        assert list((tmp_path / "second").iterdir()) == []


class TestConditionalPuts:
    @pytest.mark.parametrize(
        "answer",
        [
            ("501 Not Implemented", "NotImplemented"),
            ("501 Not Implemented", ""),
            ("405 Method Not Allowed", ""),
            ("400 Bad Request", "InvalidArgument"),
        ],
    )
    def test_where_they_are_rejected_it_looks_before_it_writes_and_says_so_once(
        self, s3_server: S3Server, s3_url, caplog, answer
    ):
        objects = Objects(s3_url, timeout=4)
        with s3_server.trouble(refuse(*answer), where=conditional) as trouble:
            assert objects.create("once", b"mine")
            asked = trouble.fired
            assert not objects.create("once", b"yours")
            assert objects.create("another", b"mine")
            assert 1 <= asked == trouble.fired, "it is not tried again"
        assert objects.get("once", limit=9) == b"mine"
        [message] = told(caplog)
        assert message.startswith(f"codistill: {s3_url} knows no conditional puts: ")
        assert "\n" not in message

    def test_where_the_condition_is_ignored_nothing_is_overwritten_all_the_same(self, s3_server, s3_url, caplog):
        objects = Objects(s3_url, timeout=5)
        with s3_server.trouble(ignore_condition, where=conditional) as trouble:
            objects.put("there", b"first")
            assert not objects.create("there", b"second")
            assert objects.create("once", b"mine")
            assert not objects.create("once", b"yours")
        assert trouble.fired == 2
        assert objects.get("there", limit=9) == b"first"
        assert objects.get("once", limit=9) == b"mine"
        assert len(told(caplog)) == 1

    def test_a_server_that_has_them_is_known_after_one_more_request(self, s3_server, s3_url, caplog):
        objects = Objects(s3_url, timeout=5)

        def honestly(trouble, request, honest):
            return honest()

        with s3_server.trouble(honestly) as watched:
            assert objects.create("once", b"mine")
            assert watched.fired == 3  # a look, the object, and once more
            assert objects.create("twice", b"mine")
            assert not objects.create("once", b"yours")
            assert watched.fired == 5
        assert objects.get("once", limit=9) == b"mine"
        assert told(caplog) == []

    @pytest.mark.parametrize("answer", [("503 Slow Down", "SlowDown"), ("501 Not Implemented", "NotImplemented")])
    def test_an_outage_is_not_taken_for_a_server_without_them(self, s3_server, s3_url, caplog, answer):
        objects = Objects(s3_url, timeout=4)
        with (
            s3_server.trouble(refuse(*answer), where=writing()) as trouble,
            pytest.raises(StorageError, match=f"writing .*/once failed: .*{answer[0][:3]}"),
        ):
            objects.create("once", b"mine")
        assert trouble.fired > 0
        with s3_server.trouble(lambda trouble, request, honest: honest(), where=conditional) as watched:
            assert objects.create("once", b"mine")
            assert watched.fired == 2
        assert told(caplog) == []

    def test_a_user_can_say_that_there_are_none(self, s3_url, caplog, monkeypatch):
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
        objects = Objects(s3_url, timeout=5)
        assert objects.create("once", b"mine")
        assert not objects.create("once", b"yours")
        assert len(told(caplog)) == 1


class TestTroubleWithAServer:
    @pytest.mark.parametrize(("name", "answer"), list(zip(OPERATIONS, 3 * OUTAGES, strict=False)))
    def test_retries_slow_down_and_end(self, s3_server, s3_url, tmp_path, name, answer):
        objects = Objects(s3_url, timeout=1.5)
        with s3_server.trouble(refuse(*answer, Retry_After="1")) as trouble, pytest.raises(StorageError) as caught:
            OPERATIONS[name](objects, "key", tmp_path / "file")
        assert 2 <= trouble.fired <= 9  # one, and more for half the timeout, each after a tenth of a second at least
        assert f"status code: {answer[0][:3]} " in str(caught.value)
        OPERATIONS[name](objects, "key", tmp_path / "file")

    def test_the_reason_is_in_the_line(self, s3_server, s3_objects):
        with (
            s3_server.trouble(refuse("403 Forbidden", "ExpiredToken")) as trouble,
            pytest.raises(StorageError, match=r"403 Forbidden: ExpiredToken: On purpose\.$"),
        ):
            s3_objects.get("key", limit=1)
        assert trouble.fired == 1

    def test_where_absent_objects_are_forbidden_the_missing_permission_is_named(self, s3_server, s3_objects):
        with s3_server.trouble(refuse("403 Forbidden", "AccessDenied")):
            for ask in (lambda: s3_objects.get("key", limit=1), lambda: s3_objects.exists("key")):
                with pytest.raises(StorageError, match=r"403 Forbidden:.* \(so S3 .* permission s3:ListBucket\)$"):
                    ask()
            with pytest.raises(StorageError, match=r"AccessDenied: On purpose\.$"):
                s3_objects.put("key", b"data")

    def test_the_parts_of_an_object_go_one_at_a_time(self, s3_server, s3_objects):
        """Four at once would each have a quarter of a slow line, and all of them the same time."""
        under_way, most = [], []

        def count(trouble, request, honest):
            under_way.append(request)
            most.append(len(under_way))
            time.sleep(0.1)
            try:
                return honest()
            finally:
                under_way.remove(request)

        with s3_server.trouble(count, where=lambda request: "partNumber" in request.args):
            s3_objects.put("key", bytes(3 * CHUNK + 1))
        assert most == [1] * 4
        assert s3_objects.size("key") == 3 * CHUNK + 1

    @pytest.mark.parametrize("damage", [cut_short, reset_in_the_middle])
    def test_a_body_that_breaks_off_is_asked_for_again_from_there(self, s3_server, s3_objects, tmp_path, damage):
        s3_objects.put("key", PAYLOAD)
        with s3_server.trouble(damage, where=lambda request: request.method == "GET", times=2) as trouble:
            assert s3_objects.get("key", limit=len(PAYLOAD)) == PAYLOAD
        assert trouble.fired == 2
        with s3_server.trouble(damage, where=lambda request: request.method == "GET", times=2) as trouble:
            assert s3_objects.download("key", tmp_path / "file", size=len(PAYLOAD)) is not None
        assert trouble.fired == 2
        assert (tmp_path / "file").read_bytes() == PAYLOAD

    @pytest.mark.parametrize("damage", [cut_short, reset_in_the_middle])
    def test_a_body_that_always_breaks_off_is_a_storage_error(self, s3_server, s3_url, tmp_path, damage):
        objects = Objects(s3_url, timeout=1)
        objects.put("key", PAYLOAD)
        with s3_server.trouble(damage, where=lambda request: request.method == "GET") as trouble:
            with pytest.raises(StorageError):
                objects.get("key", limit=len(PAYLOAD))
            with pytest.raises(StorageError):
                objects.download("key", tmp_path / "file", size=len(PAYLOAD))
        assert trouble.fired > 2
        assert not (tmp_path / "file").exists()

    def test_a_server_that_says_nothing_is_given_up(self, s3_server, s3_url, operation):
        objects = Objects(s3_url, timeout=2)
        with s3_server.trouble(hang) as trouble:
            with pytest.raises(StorageError):
                operation(objects, "key")
            assert trouble.fired > 0
        operation(objects, "key")

    def test_a_bucket_that_vanishes_is_no_absent_object_and_may_come_back(self, s3_server, s3_url):
        objects = Objects(s3_url, timeout=2)
        objects.put("key", b"data")
        bucket = s3_url.split("/")[2]
        s3_server.client().delete_object(Bucket=bucket, Key="some/prefix/key")
        s3_server.client().delete_bucket(Bucket=bucket)
        for name in ("get", "put", "create"):
            with pytest.raises(StorageError, match=r"404 Not Found: NoSuchBucket: "):
                OPERATIONS[name](objects, "key", Path("unused"))
        s3_server.client().create_bucket(Bucket=bucket)
        assert objects.get("key", limit=9) is None
        objects.put("key", b"data")
        assert objects.get("key", limit=9) == b"data"


class TestTroubleWithAFolder:
    def test_a_folder_that_vanished_is_made_again_by_a_put(self, folder_objects, tmp_path):
        folder_objects.put("a/key", b"data")
        (tmp_path / "store").rename(tmp_path / "moved")
        assert folder_objects.get("a/key", limit=9) is None
        folder_objects.delete(["a/key"])
        folder_objects.put("a/key", b"again")
        assert folder_objects.get("a/key", limit=9) == b"again"
        assert folder_objects.create("b/key", b"data")

    def test_a_folder_that_is_no_folder_for_a_while_is_a_storage_error_for_that_while(self, folder_objects, tmp_path):
        folder_objects.put("a/key", b"data")
        (tmp_path / "store").rename(tmp_path / "moved")
        (tmp_path / "store").write_bytes(b"")
        for name in ("put", "create"):
            with pytest.raises(StorageError, match="Not a directory"):
                OPERATIONS[name](folder_objects, "a/key", Path("unused"))
        (tmp_path / "store").unlink()
        (tmp_path / "moved").rename(tmp_path / "store")
        assert folder_objects.get("a/key", limit=9) == b"data"
        folder_objects.put("a/key", b"again")


class TestFolders:
    def test_the_first_segments_of_keys_are_named(self, objects):
        assert objects.folders() == []
        for key in ("b/key", "a/deeper/key", "a/key", "key"):
            objects.put(key, b"data")
        assert objects.folders() == ["a", "b"]

    def test_odd_things_and_links_are_none(self, folder_objects, tmp_path):
        folder_objects.put("run/key", b"data")
        (tmp_path / "store" / "link").symlink_to(tmp_path)
        os.mkfifo(tmp_path / "store" / "pipe")
        assert folder_objects.folders() == ["run"]

    def test_a_place_that_cannot_be_listed_is_a_storage_error(self, folder_objects, tmp_path, s3_server, s3_objects):
        (tmp_path / "store").rmdir()
        with pytest.raises(StorageError, match=r"listing .*/store failed: .*No such file"):
            folder_objects.folders()
        with (
            s3_server.trouble(refuse("403 Forbidden", "AccessDenied")),
            pytest.raises(StorageError, match=r"listing s3://.*/prefix failed: .*AccessDenied"),
        ):
            s3_objects.folders()


class TestSweep:
    def test_everything_below_the_folder_goes_but_what_is_kept(self, objects):
        for key in ("1/a", "1/b", "1/c", "1/deeper/d", "1/deeper/e", "11/a", "1.json", "2/a"):
            objects.put(f"run/{key}", b"data")
        assert objects.sweep("run/1", {"run/1/b", "run/1/deeper/e", "run/1/nothing"}) == 3
        for key in ("1/b", "1/deeper/e", "11/a", "1.json", "2/a"):
            assert objects.exists(f"run/{key}"), key
        for key in ("1/a", "1/c", "1/deeper/d"):
            assert not objects.exists(f"run/{key}"), key
        assert objects.sweep("run/1", {"run/1/b", "run/1/deeper/e"}) == 0

    def test_nothing_below_the_folder_is_fine(self, objects):
        assert objects.sweep("run/1", set()) == 0

    def test_unfinished_files_go_and_odd_things_stay(self, folder_objects, tmp_path):
        folder = tmp_path / "store" / "run" / "1"
        folder_objects.put("run/1/kept", b"data")
        folder_objects.put("run/1/gone", b"data")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").write_bytes(b"not ours")
        for name in ("kept#1", "gone#12", "never-finished#1"):
            (folder / name).write_bytes(b"half")
        os.mkfifo(folder / "pipe")
        (folder / "link").symlink_to(tmp_path / "elsewhere" / "file")
        (folder / "links").symlink_to(tmp_path / "elsewhere")
        (folder / "new\nline").write_bytes(b"")
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_bytes(b"")
        before = set(folder.iterdir())
        assert folder_objects.sweep("run/1", {"run/1/kept"}) == 4
        gone = {folder / name for name in ("gone", "kept#1", "gone#12", "never-finished#1")}
        assert set(folder.iterdir()) == before - gone
        assert (tmp_path / "elsewhere" / "file").read_bytes() == b"not ours"
        assert folder_objects.get("run/1/kept", limit=9) == b"data"

    @pytest.mark.parametrize("key", ["run/1", "run"])
    def test_a_folder_that_is_a_link_is_refused(self, folder_objects, tmp_path, key):
        (tmp_path / "elsewhere" / "1").mkdir(parents=True)
        (tmp_path / "elsewhere" / "1" / "file").write_bytes(b"not ours")
        (tmp_path / "elsewhere" / "file").write_bytes(b"not ours")
        link = tmp_path / "store" / key
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(Refused, match="a symbolic link where a folder belongs; remove it"):
            folder_objects.sweep("run/1", set())
        assert len([path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()]) == 2

    def test_a_folder_that_cannot_be_listed_is_a_storage_error(self, folder_objects, s3_server, s3_objects):
        with pytest.raises(StorageError, match=r"sweeping .* failed: .*File name too long"):
            folder_objects.sweep("a" * 300, set())
        with (
            s3_server.trouble(refuse("403 Forbidden", "AccessDenied"), where=reading()) as trouble,
            pytest.raises(StorageError, match=r"sweeping s3://.*/run/1 failed: .*AccessDenied"),
        ):
            s3_objects.sweep("run/1", set())
        assert trouble.fired == 1

    @pytest.mark.parametrize("folder", ["..", "../elsewhere", "run/../../elsewhere"])
    def test_nothing_outside_is_swept(self, folder_objects, tmp_path, folder):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").write_bytes(b"not ours")
        folder_objects.put("run/1/a", b"data")
        with pytest.raises(StorageError, match="a key does not lead upwards"):
            folder_objects.sweep(folder, set())
        assert (tmp_path / "elsewhere" / "file").exists()
        assert folder_objects.exists("run/1/a")

    def test_one_object_that_cannot_be_deleted_does_not_keep_the_others(self, s3_server, s3_objects):
        for name in "abc":
            s3_objects.put(f"run/1/{name}", b"data")

        def locked(trouble, request, honest):
            error = "<Error><Key>some/prefix/run/1/b</Key><Code>AccessDenied</Code><Message>Locked.</Message></Error>"
            return Response(f"<DeleteResult>{error}</DeleteResult>")

        with s3_server.trouble(locked, where=lambda request: b"run/1/b<" in request.get_data()) as trouble:
            assert s3_objects.sweep("run/1", set()) == 2
        assert trouble.fired == 1
        assert [name for name in "abc" if s3_objects.exists(f"run/1/{name}")] == ["b"]


class TestSecrets:
    @pytest.mark.parametrize(
        "name",
        [
            "AWS_SECRET_ACCESS_KEY",
            "AWS_ACCESS_KEY_ID",
            "AWS_SESSION_TOKEN",
            "AWS_SSE_CUSTOMER_KEY_BASE64",
            "GOOGLE_SERVICE_ACCOUNT_KEY",
            "AZURE_STORAGE_ACCOUNT_KEY",
            "AZURE_STORAGE_SAS_TOKEN",
            "AZURE_STORAGE_CLIENT_SECRET",
            "AZURE_STORAGE_CONNECTION_STRING",
            "CODISTILL_KEY",
        ],
    )
    def test_none_from_the_environment_is_in_a_message_in_any_form(self, s3_server, s3_url, monkeypatch, name):
        objects = Objects(s3_url, timeout=5)
        secret = "plant/ed+secret==\nin two lines"
        monkeypatch.setenv(name, secret)
        forms = (secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode())
        with (
            s3_server.trouble(lambda *_: Response(f"cannot take {' or '.join(forms)}!", "403 Forbidden")) as trouble,
            pytest.raises(StorageError) as caught,
        ):
            objects.get("key", limit=1)
        assert trouble.fired == 1
        assert str(caught.value).endswith("403 Forbidden: cannot take *** or *** or ***!")

    def test_what_a_server_quotes_of_the_request_is_left_out(self, s3_server, s3_objects):
        def quoting(trouble, request, honest):
            signed = "".join(f"{name}:{value}\n" for name, value in request.headers.items())
            return Response(
                "<?xml version='1.0'?>\n<Error><Code>SignatureDoesNotMatch</Code><Message>It does not.</Message>"
                f"<AWSAccessKeyId>planted</AWSAccessKeyId><CanonicalRequest>{signed}</CanonicalRequest></Error>",
                "403 Forbidden",
            )

        with s3_server.trouble(quoting), pytest.raises(StorageError) as caught:
            s3_objects.get("key", limit=1)
        message = str(caught.value)
        assert message.endswith("403 Forbidden: SignatureDoesNotMatch: It does not.")
        for secret in ("planted", "Authorization", *CREDENTIALS.values()):
            assert secret not in message

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("ftp://user:planted@host/folder", "ftp://host/folder"),
            ("ftp://user:plan@ted@host/folder", "ftp://host/folder"),
            ("ftp://user:plan/ted@host/folder", "ftp://host/folder"),
            ("ftp://planted@host/folder", "ftp://host/folder"),
            ("ftp://host:9000/fol@der", "ftp://host:9000/fol@der"),
            ("ftp://host/folder?sv=1&sig=planted%2B%3D", "ftp://host/folder"),
            ("ftp://host/folder?X-Amz-Credential=planted&X-Amz-Signature=planted", "ftp://host/folder"),
            ("ftp://host/folder&sig=planted", "ftp://host/folder&sig=***"),
            ("ftp://host/folder X-Amz-Security-Token=planted;", "ftp://host/folder X-Amz-Security-Token=***"),
        ],
    )
    def test_none_from_a_url_is_in_a_message(self, url, shown):
        with pytest.raises(StorageError) as caught:
            Objects(url)
        assert str(caught.value).startswith(f"opening {shown} failed: ")
        assert "planted" not in str(caught.value)

    def test_none_of_an_endpoint_or_a_proxy_is_in_a_message(self, s3_url, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:planted@127.0.0.1:1")
        with pytest.raises(StorageError, match=r"PUT http://127\.0\.0\.1:1/bucket-.*/key in") as caught:
            Objects(s3_url, timeout=0.2).put("key", b"data")
        assert "planted" not in str(caught.value)
