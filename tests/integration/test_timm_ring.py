"""Four timm trainings of two architectures on a ring: one is killed, another stopped, and the others learn on."""

from tests.integration import timm_trainings
from tests.integration.peers import ring_closes_over_a_killed_and_a_stopped_peer

script, runs = timm_trainings.script, timm_trainings.runs

RING = (
    "--codistill-topology",
    "ring",
    "--codistill-interval",
    "5",
    "--epochs",
    "1000",
    "--input-size",
    "3",
    "32",
    "32",
)
VIT = ("--model", "test_vit", "--model-kwargs", "img_size=32")


def test_a_ring_of_unlike_peers_closes_over_a_killed_and_a_stopped_one(runs):
    models = [(), VIT, (), VIT]
    peers = [runs.peer(number, *RING, *models[number], peers=4, pause=0.1) for number in range(4)]
    alive = ring_closes_over_a_killed_and_a_stopped_peer(peers)
    assert all(any(record["penalised"] for record in peer.records()) for peer in alive)
