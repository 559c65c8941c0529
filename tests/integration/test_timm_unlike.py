"""A ResNet and a vision transformer codistil: each builds the other from what its manifest says.

They differ in everything else too: precision, memory layout, batch size, optimizer, number of workers.
"""

from tests.integration import timm_trainings
from tests.integration.timm_trainings import SYNC

script, runs = timm_trainings.script, timm_trainings.runs

IMAGES = ("--input-size", "3", "32", "32")
RESNET = ("--amp", "--amp-dtype", "bfloat16", "--channels-last", "--model-ema", "--codistill-publish", "ema")
VIT = ("--model", "test_vit", "--model-kwargs", "img_size=32", "-b", "12", "--opt", "adamw", "--lr", "0.001")


def test_two_architectures_codistil(runs):
    flags = ("--epochs", "2", *SYNC, *IMAGES)
    peers = [runs.peer(0, *flags, *RESNET), runs.peer(1, *flags, *VIT, workers=2)]
    for peer in peers:
        peer.wait()
    for peer, name in zip(peers, ("test_resnet", "test_vit"), strict=True):
        last = peer.metrics()[-1]
        assert (last["peers"], last["incidents"]) == (1, 0), peer.errors()[-3000:]
        assert last["loss"] > 0
        assert any(record["penalised"] for record in peer.records())
        assert f'"{name}.' in (runs.exchange / "run/peers" / peer.save_dir.name[-1] / "latest.json").read_text()
