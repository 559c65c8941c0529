"""Who is which peer of a run: terms, claims, takeovers, and the token in the save dir."""

import hashlib
import stat
import threading
from contextlib import contextmanager

import pytest
from obstore.store import MemoryStore

from codistill import ConfigError
from codistill.exchange.errors import StorageError
from codistill.exchange.membership import INCARNATION_FILE, TOKEN_FILE, Membership, owner_token
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
from tests.fixtures_peers import NOWHERE, RUN, Writer, until
from tests.fixtures_store import failing_objects, make_latest, make_manifest, memory_objects  # noqa: F401

OURS, THEIRS = "a" * 64, "b" * 64
TERMS = {"interval": 10, "output": "f" * 64}
TAKEN = (
    "--codistill-peer 1: a running process with another save dir has this number; "
    "give each peer of the run its own --codistill-peer"
)


@pytest.fixture
def store(memory_objects):  # noqa: F811
    return RunStore(memory_objects, RUN)


def member(store, token=OURS, terms=TERMS, save_dir=NOWHERE):
    return Membership(store, 1, token, terms, save_dir)


@contextmanager
def alive(writer, token, seconds=0.03):
    """A process whose heart beats in `latest.json` while the block runs."""
    ended = threading.Event()

    def beat():
        while not ended.wait(seconds):
            writer.announce(None, token=token)

    thread = threading.Thread(target=beat)
    writer.announce(None, token=token)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_the_first_start_is_incarnation_1_and_every_next_one_counts_up(store):
    members = [member(store) for _ in range(3)]
    for one in members:
        one.join(0.1)
    assert [one.incarnation for one in members] == [1, 2, 3]
    assert [one.superseded() for one in members] == [True, True, False]


def test_the_same_owner_restarts_at_once_even_while_its_heart_still_beats(store):
    writer = Writer(store)
    with alive(writer, OURS):
        one = member(store)
        one.join(watch_seconds=3600)
    assert one.incarnation == 2  # as `latest.json` names incarnation 1


def test_another_owner_is_refused_while_the_heart_beats(store):
    with alive(Writer(store), THEIRS), pytest.raises(ConfigError) as caught:
        member(store).join(watch_seconds=30)
    assert str(caught.value) == TAKEN
    assert store.newest_claim(1, 1) == 1


def test_a_dead_owners_number_is_taken_over(store):
    writer = Writer(store)
    before = writer.announce(None, token=THEIRS)
    one = member(store)
    one.join(watch_seconds=0.2)
    assert one.incarnation == 2
    assert one.before == before


def test_the_number_of_an_owner_that_ended_is_free_at_once(store):
    Writer(store).announce(None, token=THEIRS, closed=True)
    one = member(store)
    one.join(watch_seconds=3600)
    assert one.incarnation == 2


def test_an_owner_that_ends_while_it_is_watched_gives_its_number_away(store):
    writer = Writer(store)
    writer.announce(None, token=THEIRS)
    timer = threading.Timer(0.2, lambda: writer.announce(None, token=THEIRS, closed=True))
    timer.start()
    one = member(store)
    one.join(watch_seconds=30)
    timer.join()
    assert one.incarnation == 2


def test_what_the_previous_start_left_is_known_after_joining(store):
    writer = Writer(store)
    left = writer.announce(make_manifest(run=RUN, peer=1), token=OURS)
    one = member(store)
    one.join(0.1)
    assert one.before == left


def test_an_unreadable_latest_keeps_nobody_from_joining(store):
    store.objects.put(f"{RUN}/peers/1/latest.json", b"{")
    one = member(store)
    one.join(watch_seconds=3600)
    assert (one.incarnation, one.before) == (1, None)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"interval": 20}, "interval=10, not 20"),
        ({"output": "e" * 64}, f"output={'f' * 64}, not {'e' * 64}"),
        ({"loss": "kl"}, 'loss=nothing, not "kl"'),
    ],
)
def test_other_terms_are_refused_by_name(store, changes, difference):
    member(store).join(0.1)
    with pytest.raises(ConfigError) as caught:
        member(store, terms={**TERMS, **changes}).join(0.1)
    assert str(caught.value) == (
        f"run run was started with {difference}; give all peers of a run the same options, or a new --codistill-run-id"
    )
    assert store.newest_claim(1, 1) == 1


def test_a_store_that_lost_everything_does_not_make_a_restarted_peer_an_old_one(memory_objects, tmp_path):  # noqa: F811
    for expected in (1, 2):
        one = member(RunStore(memory_objects, RUN), save_dir=tmp_path)
        one.join(0.1)
        assert one.incarnation == expected
    again = member(RunStore(Objects.over(MemoryStore()), RUN), save_dir=tmp_path)
    again.join(0.1)
    assert again.incarnation == 3


@pytest.mark.parametrize("content", [b"", b"many", b"\xff\xfe", b"9" * 5000])
def test_a_spoilt_memory_of_the_incarnation_costs_nothing(store, tmp_path, content):
    (tmp_path / INCARNATION_FILE).write_bytes(content)
    one = member(store, save_dir=tmp_path)
    one.join(0.1)
    assert one.incarnation == 1
    assert (tmp_path / INCARNATION_FILE).read_text() == "1\n"


def test_a_store_that_fails_leaves_the_number_unclaimed_and_joining_works_later(failing_objects):  # noqa: F811
    store = RunStore(failing_objects, RUN)
    one = member(store)
    for operation in ("create", "get", "exists"):
        failing_objects.fail_at(operation)
        with pytest.raises(StorageError):
            one.join(0.1)
        assert one.incarnation == 0
    assert failing_objects.fired == ["create", "get", "exists"]
    one.join(0.1)
    assert one.incarnation == 1


def test_a_claim_whose_answer_was_lost_is_not_used_twice(failing_objects):  # noqa: F811
    store = RunStore(failing_objects, RUN)
    store.agree(TERMS)
    failing_objects.fail_at("create", 2, answer_lost=True)
    one = member(store)
    with pytest.raises(StorageError):
        one.join(0.1)
    one.join(0.1)
    assert one.incarnation == 2


def test_starts_that_join_at_once_each_get_an_incarnation_of_their_own(store):
    members = [member(store) for _ in range(8)]
    threads = [threading.Thread(target=one.join, args=(0.1,)) for one in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.incarnation for one in members) == list(range(1, 9))


def test_the_token_is_made_once_kept_private_and_only_its_digest_is_told(tmp_path):
    folder = tmp_path / "save" / "dir"
    public = owner_token(folder, 0)
    secret, peer = (folder / TOKEN_FILE).read_bytes().split()
    assert owner_token(folder, 0) == public == hashlib.sha256(secret).hexdigest()
    assert (len(secret), peer) == (64, b"0")
    assert owner_token(tmp_path / "other", 0) != public
    assert [path.name for path in folder.iterdir()] == [TOKEN_FILE]


def test_a_save_dir_belongs_to_one_peer(tmp_path):
    owner_token(tmp_path, 0)
    with pytest.raises(ConfigError) as caught:
        owner_token(tmp_path, 1)
    assert str(caught.value) == (
        f"--codistill-peer 1: {tmp_path} is the save dir of peer 0; give each peer a save dir of its own"
    )


def test_the_token_can_be_read_by_its_owner_alone(tmp_path):
    owner_token(tmp_path, 0)
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600


def test_a_save_dir_that_cannot_hold_the_token_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        owner_token(tmp_path / "file" / "save", 0)
    assert str(caught.value) == (
        f"{tmp_path}/file/save/{TOKEN_FILE}: Not a directory; "
        "the save dir must be writable, since it holds the token that owns a peer number"
    )


def test_a_retired_number_is_noticed_only_by_the_older_process(store):
    old, new = member(store), member(store)
    old.join(0.1)
    assert not old.superseded()
    new.join(0.1)
    assert until(old.superseded)
    assert not new.superseded()
