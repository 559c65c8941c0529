"""The workers of one peer: real processes, joined by gloo."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.workers import Workers
from tests.fixtures_peers import data_parallel

MEETINGS = """
from codistill.workers import Workers
host = dist.group.WORLD
workers = Workers(timeout=30)
answer = {
    "of": [workers.rank, workers.size, workers.fetcher],
    "speaks": [workers.first, workers.fetches],
    "shared": workers.share([-(2**63), 2**63 - 1, 7] if rank == 0 else [rank] * 3),
    "nothing shared": workers.share([]),
    "minimum": workers.minimum([rank, -rank, 2**62 + rank]),
    "minimum of nothing": workers.minimum([]),
    "own group": workers._group is not host,
}
workers.close()
"""

LOST = """
import time
from codistill.workers import Workers, WorkersLost
workers = Workers(timeout=WAIT)
workers.minimum([1])
if rank == 1:
    if ENDS:
        print(json.dumps({}), flush=True)
        os._exit(0)
    time.sleep(WAIT + 5)  # alive, but never there
else:
    began = time.monotonic()
    try:
        workers.minimum([1])
    except WorkersLost as error:
        answer["lost"] = str(error)
    answer["seconds"] = time.monotonic() - began
"""

NEVER_MET = """
import functools, time
from pathlib import Path
from codistill import codistiller
from tests.fixtures_peers import Peer
if rank == 1:
    time.sleep(WAIT + 5)  # it does not even begin
else:
    meet = codistiller.Workers
    codistiller.Workers = lambda timeout: meet(WAIT)
    peer = Peer(Path(FOLDER), peers=PEERS)
    peer.step(5)
    answer = {"causes": peer.causes(), "updates": len(peer.losses), "peers": peer.metrics()["peers"]}
    peer.codistiller.close()
"""


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_one_worker_needs_no_group_and_agrees_with_itself(values):
    workers = Workers(timeout=1)
    assert workers._group is None
    assert (workers.rank, workers.size, workers.fetcher) == (0, 1, 0)
    assert workers.first
    assert workers.fetches
    assert workers.share(values) == values
    assert workers.minimum(values) == values
    workers.close()
    workers.close()


def test_three_workers_share_agree_on_minima_and_find_who_fetches_for_their_machine(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    here = tmp_path / "here"
    elsewhere.mkdir()
    here.mkdir()
    folders = [{"TMPDIR": str(folder)} for folder in (here, elsewhere, here)]
    answers = data_parallel(tmp_path, MEETINGS, 3, environments=folders)
    for rank, answer in enumerate(answers):
        fetcher = {0: 0, 1: 1, 2: 0}[rank]
        assert answer == {
            "of": [rank, 3, fetcher],
            "speaks": [rank == 0, rank == fetcher],
            "shared": [-(2**63), 2**63 - 1, 7],
            "nothing shared": [],
            "minimum": [0, -2, 2**62],
            "minimum of nothing": [],
            "own group": True,
        }


@pytest.mark.parametrize("ends", [True, False], ids=["it ended", "it hangs"])
def test_a_lost_worker_is_noticed_in_time_and_told_in_one_line(tmp_path, ends):
    first, _ = data_parallel(tmp_path, LOST.replace("WAIT", "2").replace("ENDS", str(ends)))
    assert first["lost"].startswith("the workers of this peer could not meet: ")
    assert "\n" not in first["lost"]
    assert first["seconds"] < 30


@pytest.mark.parametrize("peers", [1, 2])
def test_a_peer_whose_workers_never_met_trains_on_without_the_exchange(tmp_path, peers):
    values = {"WAIT": "2", "FOLDER": repr(str(tmp_path)), "PEERS": str(peers)}
    code = NEVER_MET
    for name, value in values.items():
        code = code.replace(name, value)
    first, _ = data_parallel(tmp_path, code)
    assert first == {"causes": {"workers": 1}, "updates": 5, "peers": 0}
