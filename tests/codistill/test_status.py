"""What `codistill status` makes of a run: every state, on every store, from real documents and from rubbish."""

# ruff: noqa: F401, F811 (fixtures are imported, and then named as arguments)

import io
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from codistill import KEYS, status, survey
from codistill.cli import main
from codistill.config import MAX_PEERS
from codistill.exchange import strict_json
from codistill.exchange.manifest import LATEST_BYTES, Reference
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
from codistill.status import Report, Row, look, to_json, to_text
from codistill.survey import Survey
from tests.fixtures_peers import (
    FINGERPRINT,
    RUN,
    Writer,
    identity,
    peers,
    publishers,
    quick_exchange,
    until,
    weights,
)
from tests.fixtures_store import (
    CREDENTIALS,
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
STATE = weights(0)
TERMS = {"peers": 2, "interval": 2, "loss": "kl", "dtype": "float32", "output": FINGERPRINT}
KEY = b"a key of the tests, long enough"
PATIENCE = 0.15


@pytest.fixture(autouse=True)
def quick_survey(monkeypatch):
    monkeypatch.setattr(survey, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(survey, "STORE_SECONDS", 2.0)
    for name in ("CODISTILL_KEY", "CODISTILL_KEY_FILE", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["folder", "memory", "s3"])
def objects(request):
    return request.getfixturevalue(f"{request.param}_objects")


class Faulty(FailingObjects):
    """Sizes are known too."""

    def size(self, key):
        return self.inner.size(key)


@pytest.fixture
def faulty(memory_objects):
    return Faulty(memory_objects)


@pytest.fixture
def store(objects):
    return RunStore(objects, RUN)


def surveying(objects, *, patience=PATIENCE, **how):
    """A survey of run `RUN` over objects that are open already."""
    found = Survey(objects.url, RUN, patience=patience, **how)
    found._objects, found.place = objects, objects.url
    return found


def writer(store, peer, **changes):
    """A peer that has published update 100 and spoken once."""
    made = Writer(store, peer)
    made.manifest = made.publish(STATE, 100, init_hash=identity(peer).init_hash, **changes)
    return made


def beating(*writers):
    """To be told what is waited for: each time, the writers' heartbeats advance."""

    def tell(line):
        for one in writers:
            one.announce(one.manifest)

    return tell


def states(report):
    assert report.error is None
    return [row.state for row in report.peers]


def rubbish(objects, key, data):
    objects.put(f"{RUN}/{key}", data)


def started(command, **how):
    return subprocess.Popen(
        [sys.executable, "-m", "codistill.cli", "status", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
        text=True,
        **how,
    )


class TestStates:
    def test_every_state_is_told_from_the_others(self, store):
        store.agree({**TERMS, "peers": 5})
        alive, late, finished = (writer(store, peer) for peer in (0, 1, 2))
        finished.manifest = finished.snapshot(STATE, 120, init_hash=identity(2).init_hash, final=True)
        finished.announce(finished.manifest, closed=True)
        writer(store, 4, dtype="bfloat16")
        report = look(surveying(store.objects), beating(alive))
        assert [(row.state, re.sub(r"\d+ s", "N s", row.why), row.cause) for row in report.peers] == [
            ("alive", "", None),
            ("late", "no heartbeat in N s", None),
            ("finished", "", None),
            ("missing", "it has not spoken yet", None),
            ("refused", "its weights travel as bfloat16, the run agreed on float32", "dtype"),
        ]
        assert not report.ok
        assert late.heartbeat == 1

    def test_a_row_says_what_the_newest_manifest_says(self, store):
        store.agree(TERMS)
        first = writer(store, 0, metrics={"loss": 0.5, "staleness": 3.0}, epoch=4)
        second = writer(store, 1, architecture=None)
        second.manifest = second.publish(STATE, 130, init_hash=identity(1).init_hash)
        report = look(surveying(store.objects), beating(first, second))
        assert report.ok
        assert report.peers[0] == Row(
            peer=0,
            state="alive",
            incarnation=1,
            heartbeat=first.heartbeat,
            update=100,
            epoch=4,
            final=False,
            behind=30,
            staleness=3.0,
            bytes=first.manifest.bytes,
            dtype="float32",
            architecture="linear",
            metrics={"loss": 0.5, "staleness": 3.0},
        )
        assert (report.peers[1].behind, report.peers[1].architecture) == (0, "linear")

    def test_a_peer_that_speaks_for_the_first_time_while_we_watch_is_alive(self, store):
        store.agree(TERMS)
        waited_for, newcomer = writer(store, 0), Writer(store, 1)
        newcomer.manifest = None
        report = look(surveying(store.objects), beating(waited_for, newcomer))
        assert [(row.state, row.why) for row in report.peers] == [
            ("alive", ""),
            ("alive", "it has published no snapshot yet"),
        ]

    def test_a_closed_peer_without_a_final_snapshot_is_finished_and_says_so(self, store):
        store.agree({**TERMS, "peers": 1})
        one = writer(store, 0)
        one.announce(one.manifest, closed=True)
        [row] = look(surveying(store.objects)).peers
        assert (row.state, row.why) == (
            "finished",
            "without a final snapshot: the others will find its last one stale",
        )

    def test_a_peer_is_late_only_after_the_patience_is_over(self, store):
        store.agree({**TERMS, "peers": 1})
        one, told = writer(store, 0), []

        def tell(line):
            told.append(line)
            if len(told) == 3:
                one.announce(one.manifest)

        assert states(look(surveying(store.objects, patience=60), tell)) == ["alive"]
        assert told[1:] == ["waiting for peer 0: a heartbeat is due every 5 s"] * 2

    def test_while_watching_a_peer_whose_heart_stops_becomes_late_and_alive_again(self, store):
        store.agree({**TERMS, "peers": 1})
        one, watch = writer(store, 0), surveying(store.objects)
        assert states(look(watch, beating(one))) == ["alive"]
        assert states(look(watch)) == ["alive"]  # not for long enough yet
        until(lambda: states(look(watch)) == ["late"])
        one.announce(one.manifest)
        assert states(look(watch)) == ["alive"]
        one.announce(one.manifest, closed=True)
        assert states(look(watch)) == ["finished"]

    def test_a_restarted_peer_is_alive_with_its_new_incarnation(self, store):
        store.agree({**TERMS, "peers": 1})
        one = writer(store, 0)
        watch = surveying(store.objects)
        look(watch, beating(one))
        one.incarnation, one.heartbeat = 2, 0
        one.announce(one.manifest)
        [row] = look(watch).peers
        assert (row.state, row.incarnation, row.heartbeat) == ("alive", 2, 1)


class TestRefusals:
    """Peer 1 is refused, peer 0 is not harmed."""

    @pytest.fixture
    def refused(self, store):
        store.agree(TERMS)
        good = writer(store, 0)

        def refused(**how):
            first, second = look(surveying(store.objects, **how), beating(good)).peers
            assert first.state == "alive"
            assert second.state == "refused"
            return second.cause, second.why

        return refused

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"fingerprint": "e" * 64}, ("fingerprint", "its dictionary or class list differs from the run's")),
            ({"dtype": "float16"}, ("dtype", "its weights travel as float16, the run agreed on float32")),
            ({"payload": b"short"}, ("size", "the weights of update 100 have 5 bytes, not 524")),
        ],
    )
    def test_what_a_manifest_says_wrong(self, store, refused, changes, expected):
        bytes_ = writer(store, 1, **changes).manifest.bytes
        assert refused() == (expected[0], expected[1].replace("524", str(bytes_)))

    def test_weights_that_are_not_there(self, store, refused):
        one = writer(store, 1)
        store.objects.delete([f"{RUN}/peers/1/1/{one.manifest.payload}"])
        assert refused() == ("pruned", "the weights of update 100 are not on the store")

    @pytest.mark.parametrize(
        ("data", "cause", "why"),
        [
            (b"\xff\x00 rubbish", "format", "not strict JSON: 'utf-8' codec can't decode byte 0xff"),
            (b'{"a":' * 4000 + b"1" + b"}" * 4000, "format", "not strict JSON: "),
            (b" " * (LATEST_BYTES + 1), "size", f"{LATEST_BYTES + 1} bytes, {LATEST_BYTES} are allowed"),
            (b"{}", "format", "latest.json: no key 'closed'"),
            (make_latest(run="other", peer=1).to_json(), "run", "a document of run other stands where run run keeps"),
            (make_latest(run=RUN, peer=7).to_json(), "peer", "a document of peer 7 stands where peer 1 keeps its own"),
        ],
    )
    def test_a_latest_json_that_cannot_be_used(self, store, refused, data, cause, why):
        rubbish(store.objects, "peers/1/latest.json", data)
        found = refused()
        assert found[0] == cause
        assert why in found[1]

    def test_equal_initial_weights_are_refused_by_name_on_both_sides(self, store):
        store.agree({**TERMS, "peers": 3})
        twins = [Writer(store, 0), Writer(store, 2)]
        for twin in twins:
            twin.manifest = twin.publish(STATE, 100, init_hash=identity(5).init_hash)
        report = look(surveying(store.objects), beating(*twins, writer(store, 1)))
        why = (
            "it started from the same initial weights as peer {}; give each peer its own seed, or, if both start "
            "from one checkpoint, some weights of its own (a fresh head)"
        )
        assert [(row.state, row.cause, row.why) for row in report.peers] == [
            ("refused", "init", why.format(2)),
            ("alive", None, ""),
            ("refused", "init", why.format(0)),
        ]

    def test_a_refused_peer_does_not_set_the_pace(self, store):
        store.agree(TERMS)
        one, liar = writer(store, 0), Writer(store, 1)
        liar.publish(STATE, 2**62, dtype="float16")
        report = look(surveying(store.objects), beating(one))
        assert [row.behind for row in report.peers] == [0, None]

    def test_old_documents_played_back_while_we_watch_are_a_rollback(self, store):
        store.agree({**TERMS, "peers": 1})
        one, watch = writer(store, 0), surveying(store.objects)
        old = one.manifest
        one.manifest = one.publish(STATE, 130, init_hash=identity(0).init_hash)
        assert states(look(watch, beating(one))) == ["alive"]
        one.announce(old)
        [row] = look(watch).peers
        assert (row.state, row.cause, row.update) == ("refused", "rollback", 130)
        assert row.why == "snapshot (1, 1) (incarnation, sequence) is older than (1, 2), seen before"

    def test_with_a_key_only_what_is_signed_with_it_counts(self, objects):
        signing, other, unsigned = RunStore(objects, RUN, KEY), RunStore(objects, RUN, KEY * 2), RunStore(objects, RUN)
        signing.agree({**TERMS, "peers": 3, "CODISTILL_KEY": "set"})
        good = writer(signing, 0)
        writer(unsigned, 1)
        writer(other, 2)
        report = look(surveying(objects, key=KEY), beating(good))
        assert [(row.state, row.cause) for row in report.peers] == [
            ("alive", None),
            ("refused", "signature"),
            ("refused", "signature"),
        ]
        assert report.peers[1].why == "the manifest of update 100 is not signed, and a key is set here"
        assert report.verified
        assert "float32, signatures checked" in to_text(report).splitlines()[0]
        assert KEY.decode() not in to_json(report)

    def test_without_a_key_a_signed_run_says_that_nothing_was_checked(self, objects):
        signing = RunStore(objects, RUN, KEY)
        signing.agree({**TERMS, "peers": 1, "CODISTILL_KEY": "set"})
        report = look(surveying(objects), beating(writer(signing, 0)))
        assert states(report) == ["alive"]
        assert to_text(report).splitlines()[0].endswith("float32, signatures not checked (CODISTILL_KEY is not set)")


class TestPlaces:
    def test_a_place_without_the_run_names_those_that_are_there(self, objects):
        for run in ("wmt", "imagenet"):
            RunStore(objects, run).agree(TERMS)
        objects.put("no-run/file", b"")
        report = look(surveying(objects))
        assert report.error == f"{objects.url} holds no run run; there are imagenet, wmt: choose with --run-id"

    def test_an_empty_place_says_who_will_make_the_run(self, objects):
        report = look(surveying(objects))
        assert report.error == f"{objects.url} holds no run run; its first peer will make it"
        assert not report.ok
        assert report.peers == ()

    def test_a_folder_that_is_not_there_is_not_made(self, tmp_path, capsys):
        place = tmp_path / "typo"
        assert main(["status", str(place)]) == 1
        assert capsys.readouterr() == ("", f"codistill: {place} is no folder; give what --codistill-dir was given\n")
        assert not place.exists()

    @pytest.mark.parametrize("spelled", ["{}", "file://{}"])
    def test_a_folder_may_be_a_url(self, tmp_path, capsys, spelled):
        url = spelled.format(tmp_path)
        assert main(["status", url, "--run-id", "x"]) == 1
        assert capsys.readouterr().err == f"codistill: {url} holds no run x; its first peer will make it\n"
        assert list(tmp_path.iterdir()) == []

    def test_a_bucket_that_cannot_be_reached_is_one_line_without_credentials(self, s3_url, monkeypatch, capsys):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert main(["status", s3_url]) == 1
        printed, complaint = capsys.readouterr()
        assert printed == ""
        assert complaint.startswith(f"codistill: reading {s3_url}/default/run.json failed: ")
        assert complaint.count("\n") == 1
        assert not any(secret in complaint for secret in CREDENTIALS.values())

    def test_a_store_that_hangs_is_given_up(self, memory_objects, monkeypatch):
        monkeypatch.setattr(survey, "HANGING_SECONDS", 0.1)
        hanging = Hanging(memory_objects, "run.json")
        report = look(surveying(hanging))
        hanging.end()
        assert report.error == "the store gave no answer in 0.1 s"

    def test_a_peer_that_hangs_is_asked_once_and_keeps_nobody_waiting(self, memory_objects, monkeypatch):
        monkeypatch.setattr(survey, "HANGING_SECONDS", 0.1)
        store = RunStore(memory_objects, RUN)
        store.agree(TERMS)
        one = writer(store, 0)
        hanging = Hanging(memory_objects, "peers/1/latest.json")
        report = look(surveying(hanging), beating(one))
        hanging.end()
        assert [(row.state, row.why) for row in report.peers] == [
            ("alive", ""),
            ("refused", "the store gave no answer in 0.1 s"),
        ]
        assert hanging.held == 1

    def test_a_store_that_fails_for_a_moment_is_asked_again(self, faulty):
        store = RunStore(faulty, RUN)
        store.agree({**TERMS, "peers": 1})
        one = writer(store, 0)
        faulty.fail_at("get", 2)  # the first reads run.json
        assert states(look(surveying(faulty, patience=60), beating(one))) == ["alive"]
        assert faulty.fired == ["get"]

    def test_the_first_word_that_could_be_read_after_a_failure_is_no_heartbeat(self, faulty):
        store = RunStore(faulty, RUN)
        store.agree({**TERMS, "peers": 1})
        writer(store, 0)
        faulty.fail_at("get", 2)
        assert states(look(surveying(faulty))) == ["late"]
        assert faulty.fired == ["get"]

    def test_weights_pruned_while_we_look_are_no_reason_to_refuse(self, memory_objects):
        pruning = Pruning(memory_objects)
        store = RunStore(pruning, RUN)
        store.agree({**TERMS, "peers": 1})
        one = writer(store, 0)
        pruning.writer = one
        [row] = look(surveying(pruning), beating(one)).peers
        assert (row.state, row.update) == ("alive", 130)
        assert pruning.pruned

    def test_nothing_is_written(self, tmp_path):
        store = RunStore(Objects(str(tmp_path)), RUN)
        store.agree(TERMS)
        one = writer(store, 0)
        one.announce(one.manifest, closed=True)

        def everything():
            return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in tmp_path.rglob("*")}

        before = everything()
        assert main(["status", str(tmp_path), "--run-id", RUN]) == 1
        assert everything() == before

    def test_while_watching_a_store_that_fails_is_told_and_comes_back(self, faulty):
        store = RunStore(faulty, RUN)
        store.agree({**TERMS, "peers": 1})
        one, watch = writer(store, 0), surveying(faulty, patience=60)
        assert states(look(watch, beating(one))) == ["alive"]
        faulty.fail_at("get")
        assert look(watch).error == "get fails on purpose"
        assert states(look(watch)) == ["alive"]
        assert faulty.fired == ["get"]


class Pruning(Faulty):
    """Its writer publishes and prunes just before the first size is looked at."""

    writer, pruned = None, False

    def size(self, key):
        if not self.pruned:
            self.pruned = True
            old = self.writer.manifest
            self.writer.manifest = self.writer.publish(STATE, 130, init_hash=identity(0).init_hash)
            self.writer.store.delete(0, [old.reference])
        return super().size(key)


class Hanging(Faulty):
    """Never answers for one key, until the end."""

    def __init__(self, inner, key):
        super().__init__(inner)
        self._key, self._over, self.held = f"{RUN}/{key}", threading.Event(), 0

    def get(self, key, **how):
        if key == self._key:
            self.held += 1
            self._over.wait()
        return super().get(key, **how)

    def end(self):
        self._over.set()
        until(lambda: not [thread for thread in threading.enumerate() if thread.name == "codistill-survey"])


class TestRubbish:
    @pytest.mark.parametrize(
        ("terms", "why"),
        [
            ({"peers": 10**18}, f"run.json: peers: 1 to {MAX_PEERS} are possible, not 1000000000000000000"),
            ({"peers": MAX_PEERS + 1}, f"run.json: peers: 1 to {MAX_PEERS} are possible, not 1025"),
            ({"peers": True}, f"run.json: peers: 1 to {MAX_PEERS} are possible, not True"),
            ({"peers": "2" * 99}, f"run.json: peers: 1 to {MAX_PEERS} are possible, not '{'2' * 39}"),
            ({"peers": 0}, f"run.json: peers: 1 to {MAX_PEERS} are possible, not 0"),
            ({"dtype": ["float32"]}, "run.json: dtype and output: a dtype and a fingerprint are expected"),
            ({"output": None}, "run.json: dtype and output: a dtype and a fingerprint are expected"),
        ],
    )
    def test_terms_that_cannot_be_are_one_line(self, memory_objects, terms, why):
        RunStore(memory_objects, RUN).agree({**TERMS, **terms})
        assert look(surveying(memory_objects)).error == f"MemoryStore holds a run run that no peer can join: {why}"

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (b"", "not strict JSON: "),
            (b"\x80\x04}", "not strict JSON: "),
            (b'{"a":' * 99, "not strict JSON: "),
            (b'{"a":' * 9999, ""),
            (b"[]", "not strict JSON: the top level is not an object"),
            (b" " * 2**20, "run/run.json: 1048576 bytes, 65536 are allowed"),
            (b'{"format":2,"run":"run","terms":{}}', "run/run.json is not of format 1"),
            (b'{"format":1,"run":"other","terms":{}}', "run/run.json does not describe run run"),
            (b'{"format":1,"run":"run","terms":[]}', "run/run.json does not describe run run"),
        ],
    )
    def test_a_run_json_that_is_none_is_one_line(self, memory_objects, data, why):
        rubbish(memory_objects, "run.json", data)
        error = look(surveying(memory_objects)).error
        assert error.startswith(f"MemoryStore holds a run run that no peer can join: {why}")

    @pytest.mark.parametrize("seed", range(3))
    def test_random_documents_are_refusals(self, objects, seed):
        draw = random.Random(seed)
        RunStore(objects, RUN).agree({**TERMS, "peers": 8})
        for peer in range(8):
            data = bytearray(make_latest(make_manifest(peer=peer), peer=peer).to_json())
            for _ in range(draw.randrange(1, 200)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            rubbish(objects, f"peers/{peer}/latest.json", draw.choice([bytes(data), draw.randbytes(500)]))
        assert set(states(look(surveying(objects)))) == {"refused"}

    @pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling link", "socketless device"])
    def test_odd_things_in_place_of_documents_neither_hang_nor_crash(self, tmp_path, kind):
        make = {
            "folder": os.mkdir,
            "pipe": os.mkfifo,
            "link": lambda path: os.symlink("/dev/zero", path),
            "dangling link": lambda path: os.symlink("/nowhere/at/all", path),
            "socketless device": lambda path: os.symlink("/dev/tty", path),
        }[kind]
        objects = Objects(str(tmp_path))
        store = RunStore(objects, RUN)
        store.agree({**TERMS, "peers": 3})
        good = writer(store, 0)
        (tmp_path / RUN / "peers" / "1").mkdir()
        make(tmp_path / RUN / "peers" / "1" / "latest.json")
        odd = writer(store, 2)
        payload = tmp_path / RUN / "peers" / "2" / "1" / odd.manifest.payload
        payload.unlink()
        make(payload)
        report = look(surveying(objects), beating(good, odd))
        assert states(report) == ["alive", "refused", "refused"]
        (tmp_path / RUN / "run.json").unlink()
        make(tmp_path / RUN / "run.json")
        assert look(surveying(objects)).error

    def test_odd_names_beside_the_run_do_not_matter(self, tmp_path):
        for name in ("a\nb", "x\x1b[31m", "ü", "NAME#1", "-rf"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "run.json").write_text("{}")
        (tmp_path / "loop").symlink_to(tmp_path)
        assert look(surveying(Objects(str(tmp_path)))).error.startswith(f"{tmp_path} holds no run run; ")

    def test_the_most_peers_there_can_be_are_surveyed(self, memory_objects):
        RunStore(memory_objects, RUN).agree({**TERMS, "peers": MAX_PEERS})
        report = look(surveying(memory_objects))
        assert states(report) == ["missing"] * MAX_PEERS
        assert len(to_text(report).splitlines()) == MAX_PEERS + 5

    def test_only_what_is_shown_of_a_large_document_is_kept(self, memory_objects):
        store = RunStore(memory_objects, RUN)
        store.agree({**TERMS, "peers": 1})
        one = Writer(store, 0)
        manifest = one.snapshot(STATE, 1, metrics={"loss": 1.0})  # small enough for a manifest of its own
        huge = {"name": "n" * 8000, "arguments": {"text": "t" * 8000}}
        one.manifest = replace(manifest, architecture=huge, metrics={f"{i}{'m' * 1000}": i for i in range(64)})
        one.retained = tuple(Reference(1, update, update) for update in range(2000))
        watch = surveying(memory_objects)
        [row] = look(watch, beating(one)).peers
        assert row.architecture == "n" * survey.NAME
        assert {len(name) for name in row.metrics} == {survey.NAME}
        assert len(repr(watch._seen)) < 6000

    def test_nothing_from_the_store_commands_the_terminal(self, memory_objects):
        store = RunStore(memory_objects, RUN)
        evil = "\x1b[2J\x1b]0;title\x07[bold red]:skull:\r\n\u202e"
        store.agree({**TERMS, "peers": 1, "interval": evil, "loss": evil})
        one = writer(store, 0, architecture={"name": evil, "arguments": {}}, metrics={evil: 1.0})
        report = look(surveying(memory_objects), beating(one))
        text = to_text(report)
        assert text.replace("\n", "").isprintable()
        assert "?[2J??0;title?[bold red]:skull:???" in text.replace("]0", "?0")
        assert to_json(report).isascii()
        assert to_json(report).isprintable()
        assert json.loads(to_json(report))["peers"][0]["architecture"] == evil


REPORT = Report(
    place="s3://bucket/experiment",
    run="wmt",
    terms=TERMS,
    peers=(
        Row(0, "alive", "", None, 1, 9, 1500, 3, False, 0, 20.0, 6_307_840, "float32", "small", {"loss": 0.25, "b": 2}),
        Row(1, "late", "no heartbeat in 15 s", None, 2, 7, 1000, 2, False, 500, None, 6_307_840, "float32", None, {}),
        Row(2, "missing", "it has not spoken yet"),
    ),
)


class TestOutput:
    def test_the_plain_table_word_for_word(self):
        assert to_text(REPORT).splitlines() == [
            "run wmt in s3://bucket/experiment: 3 peers, every 2 updates, float32",
            "",
            "peer  state    update  epoch  behind  staleness   bytes  dtype    architecture  "
            "metrics                   incarnation  why",
            "   0  alive      1500      3       0         20  6.3 MB  float32  small         "
            "loss=0.25 b=2                       1",
            "   1  late       1000      2     500             6.3 MB  float32                "
            "                                    2  no heartbeat in 15 s",
            "   2  missing                                                                   "
            "                                       it has not spoken yet",
            "",
            "1 alive, 1 late, 1 missing",
        ]

    @pytest.mark.parametrize(
        ("width", "header"),
        [
            (110, "peer  state    update  epoch  behind  staleness   bytes  dtype    architecture  metrics"),
            (80, "peer  state    update  behind  staleness   bytes  metrics"),
            (50, "peer  state    update  behind  staleness   bytes"),
        ],
    )
    def test_a_terminal_gets_what_has_room_and_the_reasons_below(self, width, header):
        page = io.StringIO()
        Console(file=page, width=width, color_system=None).print(status._page(REPORT, width))
        lines = [line.rstrip() for line in page.getvalue().splitlines()]
        assert max(map(len, lines)) <= width
        text = " ".join(lines)
        assert header in lines
        assert text.endswith(
            "1 alive, 1 late, 1 missing peer 1 is late: no heartbeat in 15 s peer 2 is missing: it has not spoken yet"
        )

    @pytest.mark.parametrize(
        ("value", "expected"),
        [(0.0, "0"), (1e7, "10000000"), (0.41234567, "0.4123"), (1e300, "1e+300"), (-2.5, "-2.5")],
    )
    def test_numbers_are_short(self, value, expected):
        assert status._number(value) == expected

    def test_the_metrics_that_matter_come_first_and_staleness_has_its_own_column(self):
        metrics = dict.fromkeys((*KEYS, "another"), 1.0)
        assert status._cell("metrics", metrics) == "loss=1 agreement=1 alpha=1 incidents=1 distance=1 another=1"

    def test_columns_in_which_nobody_has_anything_are_left_out(self):
        bare = replace(REPORT, peers=(Row(0, "missing", "it has not spoken yet"),))
        assert to_text(bare).splitlines()[2:4] == [
            "peer  state    why",
            "   0  missing  it has not spoken yet",
        ]

    def test_the_json_has_every_key_always(self):
        keys = {"place", "run", "peers", "terms", "verified", "error", "ok"}
        for report in (REPORT, Report("place", "run", error="none")):
            assert json.loads(to_json(report)).keys() == keys
            assert "\n" not in to_json(report)
        missing = json.loads(to_json(REPORT))["peers"][2]
        assert missing == {
            "peer": 2,
            "state": "missing",
            "why": "it has not spoken yet",
            "cause": None,
            "incarnation": None,
            "heartbeat": None,
            "update": None,
            "epoch": None,
            "final": None,
            "behind": None,
            "staleness": None,
            "bytes": None,
            "dtype": None,
            "architecture": None,
            "metrics": None,
        }


class TestCommand:
    def test_a_real_run_is_alive_then_finished_and_the_exit_status_is_0(self, tmp_path, peers, capsys):
        made = [peers(0), peers(1)]
        for peer in made:
            peer.step(5)
        command = ["status", str(tmp_path / "store"), "--run-id", RUN]
        assert main(command) == 0
        assert capsys.readouterr().out.endswith("\n2 alive\n")
        for peer in made:
            peer.codistiller.finish(peer.update)
        assert main([*command, "--json"]) == 0
        [line] = capsys.readouterr().out.splitlines()
        assert [row["state"] for row in json.loads(line)["peers"]] == ["finished", "finished"]
        assert json.loads(line)["terms"]["interval"] == 2

    def test_a_missing_peer_makes_the_exit_status_1(self, tmp_path, peers, capsys):
        peers(0).step(3)
        assert main(["status", str(tmp_path / "store"), "--run-id", RUN]) == 1
        assert capsys.readouterr().out.endswith("\n1 alive, 1 missing\n")

    def test_a_publisher_that_has_published_nothing_is_alive(self, memory_objects, publishers):
        store = RunStore(memory_objects, RUN)
        publishers(objects=memory_objects)
        until(lambda: store.latest(0))
        terms = {"format": 1, "run": RUN, "terms": {**TERMS, "peers": 1}}  # this one started without any
        rubbish(memory_objects, "run.json", strict_json.dumps(terms))
        [row] = look(surveying(memory_objects, patience=20)).peers
        assert (row.state, row.why) == ("alive", "it has published no snapshot yet")

    def test_on_s3_from_the_command_line(self, s3_url, capsys):
        store = RunStore(Objects(s3_url), RUN)
        store.agree({**TERMS, "peers": 1})
        one = writer(store, 0)
        one.announce(one.manifest, closed=True)
        assert main(["status", s3_url, "--run-id", RUN, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["place"] == s3_url

    def test_the_key_comes_from_the_environment(self, tmp_path, monkeypatch, capsys):
        store = RunStore(Objects(str(tmp_path)), RUN)
        store.agree({**TERMS, "peers": 1})
        one = writer(store, 0)
        one.announce(one.manifest, closed=True)
        monkeypatch.setenv("CODISTILL_KEY", KEY.decode())
        assert main(["status", str(tmp_path), "--run-id", RUN]) == 1
        assert "the manifest of update 100 is not signed, and a key is set here" in capsys.readouterr().out

    def test_with_an_error_the_json_says_it_on_standard_output(self, tmp_path, capsys):
        assert main(["status", str(tmp_path), "--json"]) == 1
        printed, complaint = capsys.readouterr()
        assert json.loads(printed)["error"] == f"{tmp_path} holds no run default; its first peer will make it"
        assert complaint == ""

    def test_watching_follows_a_run_until_it_is_interrupted(self, tmp_path, peers):
        made = [peers(0), peers(1)]
        made[0].step(3)
        command = [str(tmp_path / "store"), "--run-id", RUN, "--watch", "--json", "--interval", "0.05"]
        with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                reports = (json.loads(line) for line in process.stdout)
                assert [row["state"] for row in next(reports)["peers"]] == ["alive", "missing"]
                made[1].step(3)
                next(found for found in reports if {row["state"] for row in found["peers"]} == {"alive"})
                for peer in made:
                    peer.codistiller.finish(peer.update)
                next(found for found in reports if {row["state"] for row in found["peers"]} == {"finished"})
                process.send_signal(signal.SIGINT)
                _, complaints = process.communicate(timeout=30)
            finally:
                process.kill()
        assert (process.returncode, complaints) == (0, "")

    def test_watching_an_empty_place_waits_for_the_run_and_ends_with_1(self, tmp_path):
        with started(
            [str(tmp_path), "--watch", "--interval", "0.05"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                line = f"codistill: {tmp_path} holds no run default; its first peer will make it\n"
                assert [process.stderr.readline() for _ in range(2)] == [line] * 2
                RunStore(Objects(str(tmp_path)), "default").agree({**TERMS, "peers": 1})
                assert process.stdout.readline().startswith(f"run default in {tmp_path}: 1 peer, every 2 updates")
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=30)
            finally:
                process.kill()
        assert process.returncode == 1

    def test_a_reader_that_has_seen_enough_ends_it_quietly(self, tmp_path):
        with started(
            [str(tmp_path), "--watch", "--json", "--interval", "0.05"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                assert json.loads(process.stdout.readline())["error"]
                process.stdout.close()
                assert process.wait(timeout=30) == 1
                assert process.stderr.read() == ""
            finally:
                process.kill()

    def test_on_a_terminal_the_table_is_coloured_and_refreshed_in_place(self, tmp_path, peers):
        peer = peers(0, peers=2)
        peer.step(3)
        seen = on_a_terminal(
            [str(tmp_path / "store"), "--run-id", RUN, "--watch", "--interval", "0.05"],
            lambda text: text.count("missing") >= 6,
        )
        assert "\x1b[32malive" in seen
        assert "\x1b[33mmissing" in seen
        assert "\x1b[1A" in seen  # the cursor goes up: in place
        assert "Traceback" not in seen

    def test_on_a_terminal_a_spinner_says_what_is_waited_for(self, tmp_path):
        store = RunStore(Objects(str(tmp_path)), RUN)
        store.agree({**TERMS, "peers": 1})
        writer(store, 0)
        seen = on_a_terminal([str(tmp_path), "--run-id", RUN], lambda text: "waiting for peer 0" in text)
        assert "waiting for peer 0: a heartbeat is due every 5 s" in seen
        assert "Traceback" not in seen


def on_a_terminal(command, enough):
    """What the command shows on a terminal until there is `enough` of it and it is interrupted; its status is 1."""
    ours, theirs = pty.openpty()
    process = started(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen, end = b"", time.monotonic() + 60
    try:
        interrupted = False
        while True:
            ready, _, _ = select.select([ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, seen
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not interrupted and enough(seen.decode(errors="replace")):
                process.send_signal(signal.SIGINT)
                interrupted = True
        assert process.wait(timeout=30) == 1
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return seen.decode()
