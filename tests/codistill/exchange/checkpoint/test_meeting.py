"""The meeting of a peer's workers: what worker 0 proposes, all take up or none does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.exchange.checkpoint.meeting import Proposal, Readiness, decode, encode, meet
from codistill.exchange.manifest import Reference
from codistill.workers import Workers
from tests.fixtures_peers import data_parallel
from tests.fixtures_store import make_manifest

counts = st.integers(0, 2**63 - 1)
references = st.builds(Reference, st.integers(1, 2**63 - 1), counts, counts)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
proposals = st.builds(Proposal, st.just(3), references, digests, st.booleans())

MEETING = """
from codistill.exchange.manifest import Reference
from codistill.exchange.checkpoint.meeting import Proposal, Readiness, meet
from codistill.workers import Workers
workers = Workers(timeout=30)
proposed = {peer: Proposal(peer, Reference(1, 10 * peer, peer), f"{peer:064x}", peer == 3) for peer in (1, 3, 4)}
proposed[2] = None
# Peer 1: all ready. Peer 2: nothing proposed. Peer 3: one worker is still fetching. Peer 4: one worker refuses.
# One place is left empty.
judged = [{1: 2, 3: 2, 4: 1}, {1: 2, 3: 1, 4: 2}, {1: 2, 3: 2, 4: 0}][rank]
asked = []
def readiness(proposal):
    asked.append(proposal.peer)
    return Readiness(judged[proposal.peer])
agreed = meet(workers, 5, proposed if rank == 0 else {}, readiness)
answer = {
    "agreed": {peer: [p == proposed[peer], readiness.name] for peer, (p, readiness) in agreed.items()},
    "asked": asked,
}
"""


@given(st.none() | proposals)
def test_a_proposal_survives_the_way_through_integers(proposal):
    fields = encode(3, proposal)
    assert decode(fields) == (3, proposal)
    assert len(fields) == 9
    assert all(-(2**63) <= field < 2**63 for field in fields)


def test_a_proposal_names_what_the_manifest_describes():
    manifest = make_manifest(peer=3, incarnation=2, update=70, sequence=9, final=True)
    assert Proposal.of(manifest) == Proposal(3, Reference(2, 70, 9), manifest.sha256, True)


@pytest.mark.parametrize("answer", list(Readiness))
def test_a_worker_alone_decides_for_itself(answer):
    proposal = Proposal(1, Reference(1, 10, 1), "ab" * 32, False)
    assert meet(Workers(timeout=1), 2, {1: proposal}, lambda _: answer) == {1: (proposal, answer)}


def test_without_peers_or_proposals_a_meeting_decides_nothing():
    workers = Workers(timeout=1)
    assert meet(workers, 0, {}, lambda _: Readiness.READY) == {}
    assert meet(workers, 2, {}, lambda _: Readiness.READY) == {}
    assert meet(workers, 2, {7: None}, lambda _: Readiness.REFUSED) == {7: (None, Readiness.READY)}


def test_all_workers_take_up_a_proposal_or_none_does(tmp_path):
    for answer in data_parallel(tmp_path, MEETING, 3):
        assert answer == {
            "agreed": {
                "1": [True, "READY"],
                "3": [True, "PENDING"],
                "4": [True, "REFUSED"],
                "2": [True, "READY"],
            },
            "asked": [1, 3, 4],
        }
