"""The manifest and latest.json: every key there, none unknown, every value of its type and in its range."""

import json
from typing import Any

import pytest

from codistill.exchange.errors import Refused
from codistill.exchange.manifest import (
    ARCHITECTURE_BYTES,
    LATEST_BYTES,
    MANIFEST_BYTES,
    MOST,
    RETAINED,
    Latest,
    Manifest,
    Reference,
)
from tests.fixtures_store import make_latest, make_manifest

MISSING = object()
LATEST = make_latest(make_manifest(), retained=(Reference(1, 50, 0), Reference(1, 100, 1)))


def changed(document: Manifest | Latest, key: str, value: Any) -> bytes:
    plain = json.loads(document.to_json())
    plain[key] = value
    if value is MISSING:
        del plain[key]
    return json.dumps(plain).encode()


def test_the_manifest_of_format_1_is_frozen_to_the_byte():
    assert make_manifest().to_json() == (
        b'{"architecture":{"arguments":{"width":3},"name":"linear"},"bytes":7,"dtype":"float32","epoch":2,"final":false,'
        b'"fingerprint":"' + b"f" * 64 + b'","format":1,"hmac":null,"incarnation":1,"init_hash":"' + b"0" * 64 + b'",'
        b'"metrics":{"loss":1.5},"payload":"100-a1b2c3d4.safetensors","peer":0,"run":"run","sequence":1,'
        b'"sha256":"239f59ed55e737c77147cf55ad0c1b030b6d7ee748a7426952f9b852d5a935e5","update":100}'
    )


def test_the_latest_of_format_1_is_frozen_to_the_byte():
    assert make_latest(retained=(Reference(1, 100, 3),)).to_json() == (
        b'{"closed":false,"format":1,"heartbeat":7,"incarnation":1,"manifest":null,"peer":0,"resume_floor":50,'
        b'"retained":[[1,100,3]],"run":"run","token":"' + b"a" * 64 + b'"}'
    )


@pytest.mark.parametrize(
    "manifest",
    [
        make_manifest(),
        make_manifest(update=0, payload="0-0000.safetensors", peer=12, final=True, metrics={}, architecture=None),
        make_manifest(dtype="bfloat16", hmac="b" * 64, sequence=MOST),
    ],
)
def test_a_manifest_survives_the_round_trip(manifest):
    assert Manifest.parse(manifest.to_json()) == manifest
    latest = make_latest(manifest, peer=manifest.peer)
    assert Latest.parse(latest.to_json()) == latest


def test_metrics_that_are_not_finite_are_left_out():
    written = make_manifest(metrics={"a": 1, "b": float("nan"), "c": float("inf")}).to_json()
    assert Manifest.parse(written).metrics == {"a": 1.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, MISSING) for key in json.loads(make_manifest().to_json())),
        ("surprise", 1),
        ("format", 2),
        ("format", True),
        ("format", "1"),
        ("run", ""),
        ("run", "../other"),
        ("run", 1),
        ("peer", -1),
        ("peer", 0.0),
        ("peer", True),
        ("peer", "0"),
        ("incarnation", 0),
        ("sequence", -1),
        ("sequence", MOST + 1),
        ("update", 2**63),
        ("update", -1),
        ("update", 101),
        ("epoch", None),
        ("architecture", {"name": "x" * ARCHITECTURE_BYTES}),
        ("final", 0),
        ("final", None),
        ("payload", "99-a1b2c3d4.safetensors"),
        ("payload", "0100-a1b2c3d4.safetensors"),
        ("payload", "100-../../x.safetensors"),
        ("payload", "100-a1b2c3d4.safetensors\n"),
        ("payload", "100-a1b2c3d4.pickle"),
        ("payload", "100-.safetensors"),
        ("payload", None),
        ("bytes", -1),
        ("bytes", 1e3),
        ("sha256", "f" * 63),
        ("sha256", "F" * 64),
        ("sha256", "g" * 64),
        ("fingerprint", "f" * 65),
        ("init_hash", None),
        ("hmac", "short"),
        ("hmac", 0),
        ("dtype", "float64"),
        ("dtype", ["float32"]),
        ("dtype", {"float32": 1}),
        ("metrics", None),
        ("metrics", []),
        ("metrics", {"loss": "1"}),
        ("metrics", {"loss": True}),
        ("metrics", {"loss": None}),
        ("metrics", {str(number): 1 for number in range(65)}),
        ("architecture", "linear"),
        ("architecture", []),
    ],
)
def test_a_manifest_that_is_off_anywhere_is_refused(key, value):
    with pytest.raises(Refused) as caught:
        Manifest.parse(changed(make_manifest(), key, value))
    assert caught.value.cause == "format"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, MISSING) for key in json.loads(LATEST.to_json())),
        ("surprise", 1),
        ("format", 2),
        ("peer", None),
        ("incarnation", 0),
        ("token", "secret"),
        ("heartbeat", -1),
        ("resume_floor", 1.5),
        ("closed", 1),
        ("manifest", []),
        ("manifest", {}),
        ("manifest", {**json.loads(make_manifest().to_json()), "bytes": -1}),
        ("retained", None),
        ("retained", {}),
        ("retained", [[1, 2]]),
        ("retained", [[1, 2, -3]]),
        ("retained", [[1, 2, True]]),
        ("retained", ["123"]),
        ("retained", [[1, 2, 3]] * (RETAINED + 1)),
    ],
)
def test_a_latest_that_is_off_anywhere_is_refused(key, value):
    with pytest.raises(Refused) as caught:
        Latest.parse(changed(LATEST, key, value))
    assert caught.value.cause == "format"


@pytest.mark.parametrize(("changes", "cause"), [({"run": "other"}, "run"), ({"peer": 1}, "peer")])
def test_a_latest_with_the_manifest_of_somebody_else_is_refused(changes, cause):
    with pytest.raises(Refused) as caught:
        Latest.parse(make_latest(make_manifest(**changes)).to_json())
    assert caught.value.cause == cause


def test_a_later_format_says_so_instead_of_complaining_about_its_keys():
    with pytest.raises(Refused) as caught:
        Manifest.parse(b'{"format":2,"something":"new"}')
    assert str(caught.value) == "manifest: format 2; this version reads format 1"


def test_a_wrong_value_is_named_with_what_is_allowed():
    with pytest.raises(Refused) as caught:
        Manifest.parse(changed(make_manifest(), "incarnation", 0))
    assert str(caught.value) == "manifest: incarnation: an integer from 1 to 4611686018427387904 is expected, not 0"


def test_documents_beyond_their_caps_are_refused_before_parsing():
    for kind, cap in ((Manifest, MANIFEST_BYTES), (Latest, LATEST_BYTES)):
        with pytest.raises(Refused) as caught:
            kind.parse(b"{" * (cap + 1))
        assert caught.value.cause == "size"


def test_the_longest_list_of_snapshots_fits_the_cap():
    longest = make_latest(make_manifest(), retained=(Reference(MOST, MOST, MOST),) * RETAINED)
    assert len(longest.to_json()) + MANIFEST_BYTES <= LATEST_BYTES
    assert Latest.parse(longest.to_json()) == longest
