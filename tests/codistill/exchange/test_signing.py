"""Signed manifests: where the key comes from, what is refused without it, and that it never shows."""

import dataclasses
import json
import logging

import pytest

from codistill import ConfigError
from codistill.exchange.checkpoint.fetcher import NEWEST, Fetcher
from codistill.exchange.errors import Refused
from codistill.exchange.manifest import Manifest
from codistill.exchange.signing import signing_key
from codistill.exchange.snapshot import Template
from codistill.exchange.store import RunStore
from codistill.meters import Incidents
from tests.fixtures_peers import RUN, Writer, identity, like, peers, quick_exchange, until, weights  # noqa: F401
from tests.fixtures_store import make_manifest, memory_objects  # noqa: F401

# ruff: noqa: F811

KEY, OTHER = b"0123456789abcdef" * 2, b"fedcba9876543210" * 2


@pytest.fixture
def signed(memory_objects):
    return RunStore(memory_objects, RUN, KEY)


@pytest.fixture
def writer(signed):
    return Writer(signed)


@pytest.fixture
def incidents():
    return Incidents(fatal=False)


@pytest.fixture
def fetcher(signed, tmp_path, incidents, quick_exchange):
    (tmp_path / "snapshots").mkdir()
    made = Fetcher(
        signed, tmp_path / "snapshots", [1], like(Template(weights(0), "float32")), "float32", identity(0), incidents
    )
    made.start()
    made.wish(1, NEWEST)
    yield made
    made.close(5)


def test_the_key_comes_from_the_environment_or_a_file_named_there(monkeypatch, tmp_path):
    assert signing_key() is None
    monkeypatch.setenv("CODISTILL_KEY", f"  {KEY.decode()}\n")
    assert signing_key() == KEY
    monkeypatch.delenv("CODISTILL_KEY")
    (tmp_path / "key").write_bytes(KEY + b"\n")
    monkeypatch.setenv("CODISTILL_KEY_FILE", str(tmp_path / "key"))
    assert signing_key() == KEY


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"CODISTILL_KEY": "short-secret"},
            "CODISTILL_KEY: a key of 12 bytes; it must have 16 or more, such as `openssl rand -hex 32` gives",
        ),
        (
            {"CODISTILL_KEY": ""},
            "CODISTILL_KEY: a key of 0 bytes; it must have 16 or more, such as `openssl rand -hex 32` gives",
        ),
        (
            {"CODISTILL_KEY_FILE": "/nowhere/key"},
            "CODISTILL_KEY_FILE /nowhere/key: No such file or directory; name a readable file that holds the key",
        ),
        (
            {"CODISTILL_KEY": KEY.decode(), "CODISTILL_KEY_FILE": "/nowhere/key"},
            "CODISTILL_KEY and CODISTILL_KEY_FILE are both set; unset one of them",
        ),
    ],
)
def test_a_key_that_cannot_be_used_is_told_in_one_line_without_showing_it(monkeypatch, environment, line):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        signing_key()
    assert str(caught.value) == line


def test_a_signature_survives_the_way_through_the_store(signed, memory_objects):
    manifest = make_manifest(b"payload", metrics={"loss": 1, "distance": float("nan"), "gap": 1e-300})
    signed.put_snapshot(manifest, b"payload")
    read = signed.manifest(0, manifest.reference)
    assert read.hmac is not None
    assert dataclasses.replace(read, hmac=None, metrics={}) == dataclasses.replace(manifest, metrics={})
    assert KEY not in memory_objects.get("run/peers/0/1/100.json", limit=10**6)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Manifest)])
def test_a_signature_covers_every_field(field):
    manifest = make_manifest().signed(KEY)
    other = {
        "run": "other",
        "payload": "100-eeeeeeee.safetensors",
        "sha256": "e" * 64,
        "dtype": "float16",
        "fingerprint": "e" * 64,
        "init_hash": "e" * 64,
        "metrics": {"loss": 2.0},
        "architecture": None,
        "hmac": "e" * 64,
        "final": True,
    }
    changed = dataclasses.replace(manifest, **{field: other.get(field, 77)})
    manifest.check_signature(KEY)
    with pytest.raises(Refused) as caught:
        changed.check_signature(KEY)
    assert caught.value.cause == "signature"


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (None, "peer 1: the manifest of update 20 is not signed, and a key is set here"),
        (OTHER, "peer 1: the manifest of update 20 was not signed with the key set here"),
    ],
    ids=["not signed", "signed with another key"],
)
def test_what_is_not_signed_with_our_key_is_refused_and_the_last_good_one_kept(
    fetcher, writer, incidents, memory_objects, caplog, key, line
):
    good = writer.publish(weights(1), 10)
    until(lambda: fetcher.found(1))
    forger = dataclasses.replace(writer, store=RunStore(memory_objects, RUN, key))
    forger.publish(weights(2), 20)
    until(lambda: incidents.total)
    assert set(incidents.counts) == {"signature"}
    assert fetcher.found(1).sha256 == good.sha256
    until(lambda: line in caplog.text)
    writer.sequence = forger.sequence
    after = writer.publish(weights(3), 30)
    until(lambda: fetcher.found(1).sha256 == after.sha256)


def test_an_old_signed_manifest_played_back_is_refused_and_the_newest_kept(fetcher, writer, incidents, memory_objects):
    writer.publish(weights(1), 10)
    place = f"{RUN}/peers/1/latest.json"
    old = memory_objects.get(place, limit=10**6)
    new = writer.publish(weights(2), 20)
    until(lambda: fetcher.found(1) and fetcher.found(1).update == 20)
    memory_objects.put(place, old)
    until(lambda: incidents.total)
    assert incidents.counts == {"rollback": 1}
    assert fetcher.found(1).sha256 == new.sha256


def test_a_signed_manifest_moved_to_another_run_or_peer_is_refused(fetcher, writer, incidents, memory_objects):
    elsewhere = RunStore(memory_objects, "elsewhere", KEY)
    Writer(elsewhere).publish(weights(1), 10, run="elsewhere")
    Writer(writer.store, peer=2).publish(weights(2), 10)
    for source, cause in (("elsewhere/peers/1", "run"), (f"{RUN}/peers/2", "peer")):
        memory_objects.put(f"{RUN}/peers/1/latest.json", memory_objects.get(f"{source}/latest.json", limit=10**6))
        until(lambda cause=cause: incidents.counts[cause])
    assert fetcher.found(1) is None


def test_a_resumed_reader_remembers_the_newest_that_its_checkpoint_had_in_use(peers, monkeypatch):
    monkeypatch.setenv("CODISTILL_KEY", KEY.decode())
    one, two = peers(0), peers(1)
    one.step_until(lambda: two.step() or one.metrics()["peers"])
    place = two.save_dir.parent / "store" / RUN / "peers" / "1" / "latest.json"
    old = place.read_bytes()
    told = json.loads(old)["manifest"]["sequence"]
    one.step_until(lambda: two.step() or one.codistiller.state_dict()["in_use"]["1"]["sequence"] > told)
    state = one.codistiller.state_dict()
    one.codistiller.close()
    two.codistiller.close()
    place.write_bytes(old)
    again = peers(0)
    again.codistiller.load_state_dict(state)
    again.update = state["update"]
    again.step_until(lambda: "rollback" in again.causes())
    assert again.causes()["rollback"] == 1


def test_two_peers_with_one_key_take_each_other_up_and_no_log_shows_it(peers, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CODISTILL_KEY", KEY.decode())
    one, two = peers(0), peers(1)
    one.step_until(lambda: two.step() or (one.metrics()["peers"] and two.metrics()["peers"]))
    assert one.causes() == two.causes() == {}
    assert KEY.decode() not in caplog.text
    for path in one.save_dir.parent.rglob("*"):
        assert path.is_dir() or KEY not in path.read_bytes()


@pytest.mark.parametrize("first_has_it", [True, False])
def test_a_key_that_only_some_peers_have_is_told_by_name(peers, monkeypatch, first_has_it):
    def with_key(has):
        if has:
            monkeypatch.setenv("CODISTILL_KEY", KEY.decode())
        else:
            monkeypatch.delenv("CODISTILL_KEY", raising=False)

    with_key(first_has_it)
    peers(0).step()
    with_key(not first_has_it)
    with pytest.raises(ConfigError) as caught:
        peers(1).step()
    there, here = ('"set"', "nothing") if first_has_it else ("nothing", '"set"')
    assert str(caught.value) == (
        f"run run was started with CODISTILL_KEY={there}, not {here}; "
        "give all peers of a run the same options, or a new --codistill-run-id"
    )
