"""Planted keys and credentials are looked for in everything that real trainings on a failing bucket write or say."""

import base64
import contextlib
import os
import subprocess
import sys
import urllib.parse

import pytest
from botocore.exceptions import ClientError

from recipes.embedded.vision.data import write_digits
from tests.fixtures_store import s3_server, s3_url  # noqa: F401
from tests.integration.fairseq_trainings import SECONDS
from tests.integration.peers import FOREVER, penalised, until
from tests.integration.timm_trainings import MODEL, STAND_IN, TRAINING

# ruff: noqa: F811

PLANTED = {
    "CODISTILL_KEY": "planted+signing/key=0123456789",
    "AWS_ACCESS_KEY_ID": "PLANTEDACCESSKEYID",
    "AWS_SECRET_ACCESS_KEY": "planted+secret/access=key",
    "AWS_SESSION_TOKEN": "planted+session/token==",
}


@pytest.fixture
def planted(s3_url, monkeypatch):
    """A bucket's URL, with planted secrets in the environment that reaches it."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return s3_url


def spellings(secret):
    data = secret.encode()
    yield from (data, base64.b64encode(data), data.hex().encode(), urllib.parse.quote(secret, safe="").encode())


def found_in(data):
    return [name for name, secret in PLANTED.items() for spelling in spellings(secret) if spelling in data]


def leaks(folder):
    """The files below `folder`, by the names of the secrets in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {str(path): names for path in files if (names := found_in(path.read_bytes()))}


def objects(s3_server, bucket):
    """What is on the bucket; peers may delete some of it meanwhile."""
    client, found = s3_server.client(), []
    for item in client.list_objects_v2(Bucket=bucket)["Contents"]:
        with contextlib.suppress(client.exceptions.NoSuchKey):
            found.append(client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read())
    return found


def remove(s3_server, bucket):
    """Delete the bucket, though peers may still be writing to it."""
    client = s3_server.client()
    while any(found["Name"] == bucket for found in client.list_buckets()["Buckets"]):
        with contextlib.suppress(ClientError):
            for item in client.list_objects_v2(Bucket=bucket).get("Contents", []):
                client.delete_object(Bucket=bucket, Key=item["Key"])
            client.delete_bucket(Bucket=bucket)


def test_the_search_finds_a_secret_in_every_spelling(tmp_path):
    for name, secret in PLANTED.items():
        for number, spelling in enumerate(spellings(secret)):
            (tmp_path / f"{name}-{number}").write_bytes(b"x" + spelling)
    assert len(leaks(tmp_path)) == 4 * len(PLANTED)


def test_fairseq_peers_on_a_bucket_that_vanishes_show_no_secret(trainings, planted, s3_server):
    bucket = planted.split("/")[2]
    flags = ("--codistill-dir", planted, "--save-interval-updates", "10", "--disable-validation")
    peers = [trainings.peer(n, *flags, updates=FOREVER, pause=0.02) for n in (0, 1)]
    until(lambda: all(map(penalised, peers)), *peers)
    until(lambda: all((peer.save_dir / "checkpoint_last.pt").exists() for peer in peers), *peers)
    stored = objects(s3_server, bucket)
    assert len(stored) > 4
    assert not any(map(found_in, stored))
    remove(s3_server, bucket)
    until(lambda: all("(storage; counted" in peer.output() + peer.errors() for peer in peers), *peers)
    for peer in peers:
        peer.reach(peer.records()[-1]["update"] + 20)
    for peer in peers:
        peer.kill()
    assert leaks(trainings.folder) == {}


def test_a_timm_peer_without_its_bucket_shows_no_secret(tmp_path, planted, s3_server):
    write_digits(tmp_path / "digits")
    remove(s3_server, planted.split("/")[2])
    where = ["--data-dir", tmp_path / "digits", "--output", tmp_path / "out", "--experiment", "planted"]
    ours = ["--codistill", "--codistill-dir", planted, "--codistill-interval", "2", "--codistill-timeout", "5"]
    command = [sys.executable, "-m", "timm_codistill", STAND_IN, *where, *MODEL, *TRAINING, "--epochs", "1", *ours]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "storage" in said
    (tmp_path / "said").write_text(said)
    assert (tmp_path / "out" / "planted" / "args.yaml").exists()
    assert leaks(tmp_path) == {}
