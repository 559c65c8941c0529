"""Who is there, and who is chosen: the topology's preference among those who are worth it."""

import time

import pytest

from codistill.exchange.checkpoint.neighbours import Neighbours
from codistill.exchange.checkpoint.presence import Presence, Standing
from codistill.exchange.manifest import Reference
from codistill.topology import Topology
from tests.fixtures_peers import options
from tests.fixtures_store import make_latest, make_manifest

SILENCE = 0.05
NEWEST = Reference(1, 4, 4)


@pytest.fixture
def presence():
    return Presence(SILENCE)


def speak(presence, *peers, beat=1, final=False, **says):
    for peer in peers:
        manifest = make_manifest(run="run", peer=peer, incarnation=1, update=4, sequence=4, final=final)
        said = {"run": "run", "peer": peer, "incarnation": 1, "heartbeat": beat, "resume_floor": 0, **says}
        presence.heard(peer, make_latest(manifest, **said))


def fall_silent(presence, *peers, **says):
    speak(presence, *peers, **says)
    time.sleep(2 * SILENCE)
    speak(presence, *peers, **says)


def test_nobody_is_absent_before_a_first_look(presence):
    assert presence.standing(1) is Standing.HERE


def test_who_has_never_spoken_is_absent_until_it_speaks(presence):
    presence.heard(1, None)
    assert presence.standing(1) is Standing.ABSENT
    speak(presence, 1)
    assert presence.standing(1) is Standing.HERE


def test_a_heart_that_has_stopped_is_absence_and_any_other_beat_its_end(presence):
    fall_silent(presence, 1)
    assert presence.standing(1) is Standing.ABSENT
    speak(presence, 1, beat=0)  # started again
    assert presence.standing(1) is Standing.HERE


def test_a_word_that_makes_no_sense_is_no_beat(presence):
    speak(presence, 1)
    presence.heard(1, None)
    assert presence.standing(1) is Standing.HERE
    time.sleep(2 * SILENCE)
    presence.heard(1, None)
    assert presence.standing(1) is Standing.ABSENT


def test_two_looks_far_apart_make_nobody_absent_who_speaks(presence):
    speak(presence, 1)
    time.sleep(2 * SILENCE)
    assert presence.standing(1) is Standing.HERE
    speak(presence, 1, beat=2)
    assert presence.standing(1) is Standing.HERE


def test_a_store_that_does_not_answer_is_held_against_nobody(presence):
    speak(presence, 1)
    time.sleep(2 * SILENCE)
    presence.unreadable(1)
    speak(presence, 1)
    assert presence.standing(1) is Standing.HERE


@pytest.mark.parametrize(("final", "standing"), [(True, Standing.ENDED), (False, Standing.ABSENT)])
def test_who_is_gone_is_of_use_only_with_a_final_snapshot(presence, final, standing):
    speak(presence, 1, final=final, closed=True)
    fall_silent(presence, 2, final=final)
    assert [presence.standing(peer) for peer in (1, 2)] == [standing, standing]


def test_whose_newest_snapshot_was_refused_is_of_no_use_until_there_is_another(presence):
    speak(presence, 1)
    presence.refused(1, NEWEST)
    speak(presence, 1, beat=2)
    assert presence.standing(1) is Standing.ABSENT
    presence.refused(1, Reference(1, 2, 2))  # an older one says nothing of the newest
    assert presence.standing(1) is Standing.HERE


def test_the_lowest_floor_is_0_while_one_has_not_spoken(presence):
    speak(presence, 1, resume_floor=6)
    assert presence.lowest_floor([1, 2]) == 0
    speak(presence, 2, resume_floor=4)
    assert presence.lowest_floor([1, 2]) == 4
    assert presence.lowest_floor([1]) == 6


def neighbours(presence, topology, peers=6, **changes):
    wanted = options(peers=peers, topology=topology, interval=10, **changes)
    return Neighbours(wanted, Topology(topology, peer=0, peers=peers, seed="run"), presence)


def draw(topology, interval, peers=6):
    one = Topology(topology, peer=0, peers=peers, seed="run")
    return sorted(one.preference(interval)[: one.reads])


def test_a_ring_passes_over_the_absent_and_prefers_those_who_train_to_those_who_ended(presence):
    ring = neighbours(presence, "ring")
    assert ring.of_next_boundary(0, ()) == [5]
    presence.heard(5, None)
    speak(presence, 4, final=True, closed=True)
    speak(presence, 3)
    assert ring.of_next_boundary(0, ()) == [3]
    speak(presence, 3, beat=2, closed=True)
    speak(presence, 1, 2, closed=True)
    assert ring.of_next_boundary(0, ()) == [4]
    speak(presence, 5)
    assert ring.of_next_boundary(0, ()) == [5]


def test_the_absent_are_looked_at_where_there_is_nobody_else(presence):
    few = neighbours(presence, "random-2")
    for peer in range(1, 6):
        presence.heard(peer, None)
    assert few.of_next_boundary(0, ()) == draw("random-2", 1)
    speak(presence, 4)
    assert 4 in few.of_next_boundary(0, ())


def test_a_draw_stands_until_it_is_in_use(presence):
    few = neighbours(presence, "random-2")
    first = few.of_next_boundary(5, ())
    assert first == draw("random-2", 1)
    few.boundary_passed(10, first[:1])
    assert few.of_next_boundary(15, first[:1]) == first
    few.boundary_passed(20, first)
    assert few.chosen == []  # nobody is polled until the next draw
    assert few.of_next_boundary(25, first) == draw("random-2", 3)


def test_a_draw_does_not_wait_for_the_absent_nor_for_ever(presence):
    few = neighbours(presence, "random-2", max_staleness=30)
    absent, there = few.of_next_boundary(5, ())
    presence.heard(absent, None)

    def passing_over(interval):
        preferred = Topology("random-2", peer=0, peers=6, seed="run").preference(interval)
        return sorted([peer for peer in preferred if peer != absent][:2])

    assert few.of_next_boundary(15, [there]) == passing_over(2)
    assert few.of_next_boundary(25, ()) == passing_over(2)
    assert few.of_next_boundary(15 + 30, ()) == passing_over(5)


def test_with_sync_the_choice_is_the_topologys_alone(presence):
    for peer in range(1, 6):
        presence.heard(peer, None)
    speak(presence, 2)
    for update in (10, 20, 30):
        assert neighbours(presence, "random-2", sync=True).of_boundary(update) == draw("random-2", update // 10)
    assert neighbours(presence, "ring", sync=True).of_boundary(40) == [5]


def test_with_all_everybody_is_chosen_whoever_is_there(presence):
    everybody = neighbours(presence, "all")
    presence.heard(3, None)
    for update in (5, 15):
        assert everybody.of_next_boundary(update, ()) == [1, 2, 3, 4, 5]
        everybody.boundary_passed(update + 5, ())
        assert everybody.chosen == [1, 2, 3, 4, 5]
