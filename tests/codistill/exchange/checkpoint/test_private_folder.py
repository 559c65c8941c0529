"""A fetcher's folder on a machine: one a start, safe from other starts, and gone when its owner was killed."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from codistill.exchange.checkpoint.private_folder import PrivateFolder
from tests.fixtures_peers import quick_exchange  # noqa: F401

# ruff: noqa: F811

OWNER = """
import sys
from codistill.exchange.checkpoint.private_folder import PrivateFolder
folder = PrivateFolder(7, 0, 1)
folder.make()
(folder.path / "snapshot").write_bytes(b"mapped")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(quick_exchange):
    """A process that has made a folder; its path is the first line it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(quick_exchange)},
    )
    with process:
        yield process
        process.kill()


def test_a_start_leaves_the_folder_of_a_living_one_alone_and_removes_that_of_a_killed_one(owner, quick_exchange):
    theirs = quick_exchange / os.path.basename(owner.stdout.readline().strip())
    second = PrivateFolder(7, 0, 2)
    second.make()
    assert second.path != theirs
    assert (theirs / "snapshot").read_bytes() == b"mapped"

    owner.send_signal(signal.SIGKILL)
    owner.wait()
    third = PrivateFolder(7, 0, 3)
    third.make()
    assert set(quick_exchange.iterdir()) == {second.path, third.path}
    for folder in (second, third):
        folder.remove()
        folder.remove()


def test_what_a_kill_in_the_midst_of_removing_leaves_is_removed_by_the_next_start(quick_exchange, monkeypatch):
    first = PrivateFolder(7, 0, 1)
    first.make()
    for name in ("a", "z"):
        (first.path / name).touch()
    unlink = os.unlink

    def killed(name, **how):
        if name == "z":
            raise KeyboardInterrupt
        unlink(name, **how)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            first.remove()
    os.close(first._lock)  # as its process ends
    assert {"lock", "z"} <= {path.name for path in first.path.iterdir()}
    second = PrivateFolder(7, 0, 2)
    second.make()
    assert list(quick_exchange.iterdir()) == [second.path]
    second.remove()


def test_folders_of_other_fetchers_and_other_owners_stay_whoever_has_left_them(owner, quick_exchange):
    theirs = quick_exchange / os.path.basename(owner.stdout.readline().strip())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    for others in (PrivateFolder(7, 1, 2), PrivateFolder(8, 0, 2)):
        others.make()
        others.remove()
    assert (theirs / "snapshot").exists()
    ours = PrivateFolder(7, 0, 2)
    ours.make()
    assert not theirs.exists()
    ours.remove()


def test_it_is_for_this_user_alone_and_never_one_that_is_there_already(quick_exchange):
    folder = PrivateFolder(7, 0, 1)
    folder.make()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with pytest.raises(FileExistsError):
        PrivateFolder(7, 0, 1).make()
    folder.remove()


def test_a_link_in_the_place_of_a_folder_of_ours_is_not_followed(quick_exchange, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("lock", "file"):
        (elsewhere / name).touch()
    link = quick_exchange / PrivateFolder(7, 0, 1).path.name
    link.symlink_to(elsewhere)
    folder = PrivateFolder(7, 0, 2)
    folder.make()
    assert {path.name for path in elsewhere.iterdir()} == {"lock", "file"}
    folder.remove()
    link.unlink()
