"""Real fairseq peers that are not alike: in their models, in their data, in what they publish."""

import math

import pytest
import torch
from safetensors import safe_open

from tests.integration.fairseq_trainings import LANGUAGE_MODELING, TRANSFORMER, TRANSFORMER_LM, USER_DIR
from tests.integration.peers import penalised

SYNC = "--codistill-sync"
DEEPER = (*TRANSFORMER, "--encoder-layers", "2", "--decoder-layers", "2")
OTHER = {
    "a deeper and wider transformer": (*DEEPER, "--encoder-embed-dim", "48", "--decoder-embed-dim", "48"),
    "an lstm": ("--arch", "lstm", "--encoder-embed-dim", "24", "--decoder-embed-dim", "24", "--dropout", "0.2"),
}


@pytest.mark.parametrize("model", OTHER.values(), ids=OTHER.keys())
def test_peers_of_different_architecture_take_each_other_up(trainings, model):
    peers = [trainings.peer(0, SYNC), trainings.peer(1, SYNC, model=model)]
    for peer in peers:
        assert penalised(peer.wait()) == list(range(5, 20)), peer.output() + peer.errors()
        assert all(math.isfinite(added) and added >= 0 for added in peer.penalties().values())
        assert [line["peers"] for line in peer.metrics()] == [1, 1, 1, 1]
        assert sum(line["incidents"] for line in peer.metrics()) == 0
    sizes = [sum(value.numel() for value in peer.checkpoint()["model"].values()) for peer in peers]
    assert sizes[0] != sizes[1]


def test_language_models_of_different_depth_take_each_other_up(trainings):
    how = {"task": LANGUAGE_MODELING, "data": trainings.toy.language_modeling}
    deeper = (*TRANSFORMER_LM, "--decoder-layers", "2")
    peers = [trainings.peer(0, SYNC, model=TRANSFORMER_LM, **how), trainings.peer(1, SYNC, model=deeper, **how)]
    for peer in peers:
        assert penalised(peer.wait()) == list(range(5, 20)), peer.output() + peer.errors()
        assert sum(line["incidents"] for line in peer.metrics()) == 0


def test_each_peer_trains_on_its_own_part_of_the_data(trainings):
    task = ("--task", "codistill_translation", "--source-lang", "src", "--target-lang", "tgt")
    shard = ("--user-dir", USER_DIR, "--codistill-data-shard", "--max-epoch", "2", SYNC, "--codistill-interval", "2")
    peers = [trainings.peer(number, *shard, task=task, updates=1000) for number in (0, 1)]
    whole = trainings.peer(0, *shard, task=task, updates=1000, run_id="alone", peers=1)
    for peer in (*peers, whole):
        peer.wait()
    tokens = [sum(entry["sample_size"] for entry in peer.records()) for peer in (*peers, whole)]
    assert tokens[0] + tokens[1] == tokens[2]
    assert abs(tokens[0] - tokens[1]) < 0.1 * tokens[2]
    assert not {entry["batch"] for entry in peers[0].records()} & {entry["batch"] for entry in peers[1].records()}
    valid = [sum(entry["sample_size"] for entry in peer.records(step="valid")) for peer in (*peers, whole)]
    assert valid[0] == valid[1] == valid[2]
    assert all(penalised(peer) for peer in peers)


def test_the_average_is_published_and_fairseqs_own_is_what_it_is_without_us(trainings):
    average = ("--store-ema", "--ema-decay", "0.5")
    plain = trainings.stock("plain", *average)
    off = trainings.peer(0, *average, SYNC, "--codistill-publish", "ema", "--codistill-alpha", "0")
    on = trainings.peer(1, *average, SYNC, "--codistill-publish", "ema")
    for training in (plain, off, on):
        training.wait()
    assert off.records() == plain.records()
    saved, wanted = off.checkpoint(), plain.checkpoint()
    torch.testing.assert_close(saved["extra_state"]["ema"], wanted["extra_state"]["ema"], rtol=0, atol=0)
    assert penalised(on) == list(range(5, 20))
    assert on.metrics()[-1]["incidents"] == 0
    [path] = (trainings.exchange / "run" / "peers" / "0").rglob("20-*.safetensors")
    with safe_open(path, framework="pt") as file:
        published = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in published.items():
        torch.testing.assert_close(value, saved["extra_state"]["ema"][name], rtol=0, atol=0)
    assert any(not value.equal(saved["model"][name]) for name, value in published.items())
