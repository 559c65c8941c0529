"""Whom a peer learns from: as few as were asked for, reproducibly, and so that the peers hang together."""

from collections import Counter

import pytest

from codistill.topology import Topology


def topology(name, peer=0, peers=5, seed="run"):
    return Topology(name, peer=peer, peers=peers, seed=seed)


def drawn(name, interval, **where):
    one = topology(name, **where)
    return one.preference(interval)[: one.reads]


def test_all_read_everybody_else_and_are_read_by_everybody_else():
    one = topology("all", peer=2)
    assert (one.reads, one.reads_all, one.draws) == (4, True, False)
    assert sorted(one.preference(7)) == sorted(one.readers) == [0, 1, 3, 4]


def test_a_ring_reads_the_peer_before_and_goes_on_backwards_where_that_one_is_absent():
    assert [topology("ring", peer=peer).preference(3)[0] for peer in range(5)] == [4, 0, 1, 2, 3]
    assert topology("ring", peer=2).preference(0) == [1, 0, 4, 3]


@pytest.mark.parametrize("name", ["ring", "random-2"])
def test_whoever_reads_a_peer_is_among_its_readers(name):
    for peer in range(5):
        for interval in range(20):
            assert all(peer in topology(name, peer=read).readers for read in drawn(name, interval, peer=peer))


def test_a_draw_is_the_same_for_the_same_seed_peer_and_interval_and_for_no_other():
    draws = [tuple(drawn("random-3", interval, peers=50)) for interval in range(20)]
    assert draws == [tuple(drawn("random-3", interval, peers=50)) for interval in range(20)]
    assert len(set(draws)) == 20
    assert draws != [tuple(drawn("random-3", interval, peers=50, seed="other")) for interval in range(20)]
    assert draws != [tuple(drawn("random-3", interval, peers=50, peer=1)) for interval in range(20)]


def test_draws_are_fair_and_of_others_only():
    counts = Counter(peer for interval in range(4000) for peer in drawn("random-2", interval, peer=3))
    assert counts.keys() == {0, 1, 2, 4}
    assert all(1800 < count < 2200 for count in counts.values())  # 5 standard deviations from 2000 are 158


@pytest.mark.parametrize("name", ["random-4", "random-9", "all"])
def test_as_many_as_there_are_others_are_all_of_them_in_every_interval(name):
    one = topology(name)
    assert (one.reads, one.reads_all, one.draws) == (4, True, False)


def test_two_peers_are_all_and_a_ring_at_once():
    assert topology("ring", peers=2).reads_all
    assert topology("ring", peers=2).readers == [1]


def test_a_peer_alone_reads_nobody():
    for name in ("all", "ring", "random-2"):
        one = topology(name, peers=1)
        assert (one.reads, one.preference(0), one.readers) == (0, [], [])
