"""Four real peers on a ring: one is killed, one stopped for a while, and the others learn from who is there."""

import signal

from tests.faults.tiny_peer import PeerProcesses, Plan, Starter, wait_for

SECONDS = 40.0


def plan(folder, peer):
    options = {"dir": str(folder / "store"), "peer": peer, "peers": 4, "topology": "ring", "interval": 2, "keep": 100}
    return Plan(
        folder=str(folder / f"peer{peer}"),
        together=str(folder),
        options={**options, "run_id": "ring", "timeout": 5.0, "max_staleness": 10**6},
        seed=peer,
        until="stop",
        seconds=3 * SECONDS,
    )


def used(peer):
    """What the peer's last update had in use: by number, incarnation and update."""
    records = [record for record in peer.records() if "used" in record]
    return records[-1]["used"] if records else {}


def learn_from(peers, *wanted):
    return lambda: [list(used(peer)) for peer in peers] == [[str(number)] for number in wanted]


def test_a_ring_closes_over_a_killed_and_a_stopped_peer_and_opens_for_them_again(tmp_path):
    with Starter() as starter:
        peers = first, second, third, fourth = [PeerProcesses(starter, plan(tmp_path, peer)) for peer in range(4)]

        def told():
            return [(used(peer), peer.causes(), peer.output()) for peer in peers]

        for peer in peers:
            peer.start()
        assert wait_for(learn_from(peers, 3, 0, 1, 2), SECONDS), told()
        third.kill()
        assert wait_for(learn_from([first, second, fourth], 3, 0, 1), SECONDS), told()
        second.send(signal.SIGSTOP)
        assert wait_for(learn_from([first, fourth], 3, 0), SECONDS), told()
        before = used(first)["3"]
        assert wait_for(lambda: used(first)["3"] > before, SECONDS), told()  # they go on learning
        second.send(signal.SIGCONT)
        third.start()
        assert wait_for(learn_from(peers, 3, 0, 1, 2), SECONDS), told()
        assert wait_for(lambda: used(fourth)["2"][0] == 2, SECONDS), told()
        (tmp_path / "stop").touch()
        assert wait_for(lambda: not any(peer.running() for peer in peers), SECONDS), told()
        for peer in peers:
            assert peer.ended(), told()
            assert peer.end()["finite"]
            assert peer.end()["left"] == []
            assert peer.causes() == {}, told()
