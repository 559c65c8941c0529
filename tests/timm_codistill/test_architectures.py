"""What peers are told of a timm model, and which of those they tell of are built."""

import json

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm

from codistill.exchange.checkpoint.architectures import Architectures
from codistill.exchange.checkpoint.meeting import Proposal
from codistill.exchange.checkpoint.peer_modules import PeerModules
from codistill.exchange.manifest import Reference
from codistill.meters import Incidents
from timm_codistill.architectures import build, describe, place

# As train.py passes them on, wanted or not.
FLAGS = {
    **{"pretrained": False, "in_chans": 3, "num_classes": 7, "drop_rate": 0.1, "drop_path_rate": None},
    **{"drop_block_rate": None, "global_pool": None, "bn_momentum": None, "bn_eps": None, "scriptable": False},
    "checkpoint_path": "",
}
MODELS = {
    "test_resnet": {},
    "test_vit": {"img_size": (32, 48), "qkv_bias": False},
    "test_efficientnet": {"bn_eps": 1e-3, "bn_momentum": 0.3, "pretrained_cfg_overlay": {"file": "/some/where"}},
    "vit_tiny_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 3, "global_pool": "avg"},
    "resnet18.a1_in1k": {},
}


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def made(name, **more):
    given = {**FLAGS, **more}
    model = timm.create_model(name, **given)
    return model, describe(model, given)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_from_what_is_told_of_it_without_storage(name):
    model, told = made(name, **MODELS[name])
    arrived = json.loads(json.dumps(told))
    with torch.device("meta"):
        built = build(**arrived, classes=7)
    assert shapes(built) == shapes(model)
    assert all(parameter.is_meta for parameter in built.parameters())


def test_what_is_told_is_what_the_prediction_depends_on():
    _, told = made("test_vit", img_size=(32, 48))
    assert told == {
        "name": "test_vit.r160_in1k",
        "arguments": {"img_size": [32, 48], "in_chans": 3, "num_classes": 7},
    }
    assert told == made("test_vit.r160_in1k", img_size=(32, 48), drop_rate=0.5, attn_drop_rate=0.2)[1]
    assert told != made("test_vit", img_size=(48, 32))[1]


@pytest.mark.skipif(not hasattr(timm.create_model("test_resnet"), "_model_args"), reason="timm before 1.0.31")
def test_timm_s_own_memory_of_the_arguments_is_used_where_it_has_one():
    model = timm.create_model("test_vit", num_classes=7, img_size=32, drop_rate=0.3)
    assert describe(model) == {"name": "test_vit.r160_in1k", "arguments": {"img_size": 32, "num_classes": 7}}


def test_a_model_that_cannot_be_described_is_not():
    assert describe(torch.nn.Linear(2, 2)) is None
    assert made("test_resnet", block_args={"attn_layer": "se"})[1] is None


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("hf-hub:timm/test_resnet.r160_in1k", {}, "'hf-hub:timm/test_resnet.r160_in1k' is not in the registry of timm"),
        ("local-dir:/tmp", {}, "'local-dir:/tmp' is not in the registry of timm"),
        ("timm/test_resnet", {}, "'timm/test_resnet' is not in the registry of timm"),
        ("no_such_model", {}, "'no_such_model' is not in the registry of timm"),
        ("test_resnet\n", {}, "'test_resnet\\n' is not in the registry of timm"),
        (None, {}, "None is not in the registry of timm"),
        ("test_resnet", {"pretrained": True}, "its argument 'pretrained' is not taken from a peer"),
        ("test_resnet", {"pretrained_cfg": "r160_in1k"}, "its argument 'pretrained_cfg' is not taken from a peer"),
        ("test_resnet", {"checkpoint_path": "x"}, "its argument 'checkpoint_path' is not taken from a peer"),
        ("test_resnet", {"cache_dir": "x"}, "its argument 'cache_dir' is not taken from a peer"),
        ("test_resnet", {"scriptable": True}, "its argument 'scriptable' is not taken from a peer"),
        ("test_resnet", {"features_only": True}, "its argument 'features_only' is not taken from a peer"),
        ("test_resnet", {"__class__": 1}, "its argument '__class__' is not taken from a peer"),
        ("test_resnet", {"act_layer": "a.b"}, "its argument 'act_layer' is not taken from a peer"),
        ("test_resnet", {"act_layer": "/etc/passwd"}, "its argument 'act_layer' is not taken from a peer"),
        ("test_resnet", {"layers": [[1]]}, "its argument 'layers' is not taken from a peer"),
        ("test_resnet", {"layers": [1] * 65}, "its argument 'layers' is not taken from a peer"),
        ("test_resnet", {"block_args": {}}, "its argument 'block_args' is not taken from a peer"),
        ("test_resnet", {"num_classes": 8}, "it has 8 classes, ours has 7"),
        ("test_resnet", {}, "it has 1000 classes, ours has 7"),
    ],
)
def test_whatever_is_no_plain_model_of_the_registry_is_refused(name, arguments, why):
    with torch.device("meta"), pytest.raises(ValueError) as refusal:
        build(name, arguments, 7)
    assert str(refusal.value).startswith(why)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_peer_is_placed_as_our_own_model_is(dtype, memory_format):
    own = timm.create_model("test_vit", num_classes=7).to(dtype=dtype, memory_format=memory_format)
    peer = place(timm.create_model("test_resnet", num_classes=7), own)
    assert {parameter.dtype for parameter in peer.parameters()} == {dtype}
    wide = next(p for p in peer.parameters() if p.dim() == 4 and p.shape[2] > 1 and p.shape[1] > 1)
    assert wide.is_contiguous(memory_format=memory_format)


def test_synchronised_batch_norm_keeps_the_names_that_are_told_and_split_batch_norm_does_not():
    model, told = made("test_resnet")
    built = build(**told, classes=7)
    assert shapes(convert_sync_batchnorm(timm.create_model("test_resnet", **FLAGS))) == shapes(built)
    assert shapes(convert_splitbn_model(model, 2)) != shapes(built)


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientformerv2_s0"])
def test_a_peer_predicts_with_its_newest_weights_though_its_model_keeps_attention_biases(name):
    """These keep `attention_biases[:, idxs]` from one forward pass in eval mode to the next."""

    def trained():
        model = timm.create_model(name, num_classes=7).eval()
        for key, parameter in model.named_parameters():
            if "attention_biases" in key or parameter.dim() == 1:  # all but 0 in a new model
                torch.nn.init.normal_(parameter)
        return model

    own = timm.create_model(name, num_classes=7)
    architectures = Architectures(lambda: timm.create_model(name, num_classes=7), own.state_dict(), "float32")
    modules = PeerModules(architectures, 1, 10, Incidents(fatal=False))
    images = torch.randn(1, 3, 224, 224)
    for update in (1, 2):
        published = trained()
        proposal = Proposal(1, Reference(1, update, update), "a" * 64, False)
        assert modules.swap(proposal, None, published.state_dict(), update)
        found = modules.predictions(lambda module: module(images), update)[1]
        with torch.no_grad():
            torch.testing.assert_close(found, published(images))
