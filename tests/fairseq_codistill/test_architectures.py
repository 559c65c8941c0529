"""What a peer says of its model, and what is built from what another says: fairseq's registry and nothing else."""

import argparse
import json
import threading
import warnings

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from codistill.exchange.checkpoint.architectures import LARGEST
from codistill.exchange.manifest import ARCHITECTURE_BYTES
from fairseq_codistill.architectures import architecture, build_unlike
from tests.fairseq_codistill.toy_host import MODEL, batch, data, dictionary, hosts, quick_exchange  # noqa: F401

TRANSLATORS = {
    "transformer": MODEL,
    "another depth and width": (
        *MODEL,
        "--encoder-layers",
        "2",
        "--encoder-embed-dim",
        "8",
        "--decoder-embed-dim",
        "8",
    ),
    "another dropout": (*MODEL, "--dropout", "0.3"),
    "learned positions": (*MODEL, "--decoder-learned-pos", "--max-target-positions", "99"),
    "named size": ("--arch", "transformer_iwslt_de_en"),
    "lstm": ("--arch", "lstm"),
    "fconv": ("--arch", "fconv", "--encoder-layers", "[(64, 3)] * 2", "--decoder-layers", "[(64, 3)] + [(32, 3)]"),
    "lightconv": ("--arch", "lightconv", "--encoder-layers", "2", "--encoder-kernel-size-list", "3,5"),
}
LANGUAGE_MODELS = {
    "transformer_lm": ("--arch", "transformer_lm", "--decoder-layers", "1", "--decoder-learned-pos"),
    "named size": ("--arch", "transformer_lm_gpt", "--decoder-layers", "1", "--decoder-embed-dim", "48"),
    "lightconv_lm": ("--arch", "lightconv_lm", "--decoder-layers", "1", "--decoder-kernel-size-list", "3"),
    "fconv_lm": ("--arch", "fconv_lm", "--decoder-layers", "[(64, 3)] * 2"),
    "lstm_lm": ("--arch", "lstm_lm"),
}
TRANSLATION = ("-s", "src", "-t", "tgt")
LANGUAGE_MODELING = ("--task", "language_modeling", "--tokens-per-sample", "64")


class Training:
    """As far as fairseq-train gets before its first update."""

    def __init__(self, folder, *flags):
        arguments = [str(folder), "--cpu", "--optimizer", "adam", "--criterion", "codistill", *flags]
        parsed = options.parse_args_and_arch(options.get_training_parser(), arguments)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # fairseq still composes its configuration the way of hydra 1.0
            self.cfg = convert_namespace_to_omegaconf(parsed)
        self.task = tasks.setup_task(self.cfg.task)
        torch.manual_seed(1)
        self.model = self.task.build_model(self.cfg.model)

    @property
    def told(self):
        """Its architecture after the way through a manifest."""
        return json.loads(json.dumps(architecture(self.cfg.model)))

    def build(self, told):
        return build_unlike(told["name"], told["arguments"], self.task, self.cfg)


@pytest.fixture
def folder(data):  # noqa: F811
    dictionary().save(str(data / "dict.txt"))
    return data


def shapes(model):
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("task", "models"), [(TRANSLATION, TRANSLATORS), (LANGUAGE_MODELING, LANGUAGE_MODELS)], ids=["translation", "lm"]
)
def test_every_peer_builds_every_others_model_in_a_thread_without_storage_or_random_numbers(folder, task, models):
    trainings = [Training(folder, *task, *flags) for flags in models.values()]
    built, before = [], torch.get_rng_state()

    def build_all():
        with torch.device("meta"):
            built.extend((theirs, ours.build(theirs.told)) for ours in trainings for theirs in trainings)

    thread = threading.Thread(target=build_all)
    thread.start()
    thread.join()
    assert len(built) == len(models) ** 2
    for theirs, model in built:
        assert shapes(model) == shapes(theirs.model)
    assert sum(value.numel() for _, model in built for value in model.state_dict().values() if not value.is_meta) < 1e6
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("flags", TRANSLATORS.values(), ids=TRANSLATORS.keys())
def test_a_model_built_from_what_a_peer_says_computes_what_that_peer_computes(hosts, folder, flags):  # noqa: F811
    theirs = Training(folder, *TRANSLATION, *flags)
    built = Training(folder, *TRANSLATION, *MODEL).build(theirs.told)
    built.load_state_dict(theirs.model.state_dict())
    sample = batch(hosts(0, "--codistill-peers", "1"))["net_input"]
    assert built.eval()(**sample)[0].equal(theirs.model.eval()(**sample)[0])


def test_peers_started_with_the_same_flags_say_the_same_whatever_is_their_own(folder, tmp_path):
    apart = [
        ["--seed", "1", "--save-dir", str(tmp_path / "a"), "--codistill-peer", "0"],
        ["--seed", "2", "--save-dir", str(tmp_path / "b"), "--codistill-peer", "1", "--max-tokens", "7", "--fp16"],
    ]
    for task, flags in ((TRANSLATION, MODEL), (LANGUAGE_MODELING, LANGUAGE_MODELS["transformer_lm"])):
        one, other = (Training(folder, *task, *flags, *own).told for own in apart)
        assert one == other
        assert one["name"] == flags[1]
        assert str(tmp_path) not in json.dumps(one)


def test_what_is_told_fits_a_manifest_and_names_the_models_own_arguments_alone(folder):
    for task, models in ((TRANSLATION, TRANSLATORS), (LANGUAGE_MODELING, LANGUAGE_MODELS)):
        for flags in models.values():
            told = Training(folder, *task, *flags).told
            assert told.keys() == {"name", "arguments"}
            assert len(json.dumps(told)) < ARCHITECTURE_BYTES / 4
            assert not told["arguments"].keys() & {"seed", "save_dir", "data", "criterion", "distributed_rank", "tpu"}
            numbers = [value for value in told["arguments"].values() if isinstance(value, (int, float))]
            assert max(numbers) <= LARGEST


def test_files_are_not_told(folder):
    told = Training(folder, *TRANSLATION, *MODEL).cfg.model
    vars(told).update(encoder_embed_path="embeddings", activation_fn="/tmp/relu")
    arguments = architecture(told)["arguments"]
    assert not arguments.keys() & {
        "encoder_embed_path",
        "decoder_embed_path",
        "activation_fn",
        "checkpoint_activations",
    }


def test_arguments_beyond_what_a_manifest_takes_are_left_out(folder):
    told = Training(folder, *TRANSLATION, *MODEL).cfg.model
    told.encoder_layers = [1] * 10_000
    assert architecture(told) == {"name": "transformer", "arguments": {}}


def test_what_yaml_nests_is_told_like_the_flags(folder):
    training = Training(folder, *TRANSLATION, *MODEL)
    sides = {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 2}
    training.cfg.model = OmegaConf.create(
        {"_name": "transformer", "share_all_embeddings": True, "dropout": 0.0, "encoder": sides, "decoder": sides}
    )
    OmegaConf.set_struct(training.cfg.model, False)
    training.model = training.task.build_model(training.cfg.model)
    told = training.told
    assert told["arguments"]["encoder_layers"] == 1
    assert told["arguments"]["decoder_embed_dim"] == 16
    assert shapes(Training(folder, *TRANSLATION, *TRANSLATORS["lstm"]).build(told)) == shapes(training.model)
    assert shapes(training.build(Training(folder, *TRANSLATION, *MODEL).told)) == shapes(training.model)


def test_a_configuration_without_a_name_tells_nothing():
    assert architecture(argparse.Namespace()) is None


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("no_such_model", {}, "fairseq has no model of that name here"),
        ("os.path", {}, "fairseq has no model of that name here"),
        ("transformer", {"seed": 3}, "the argument seed is not one of this model's"),
        ("transformer", {"__class__": "x"}, "the argument __class__ is not one of this model's"),
        ("transformer", {"encoder_embed_path": "x"}, "the argument encoder_embed_path is not one of this model's"),
        (
            "transformer_from_pretrained_xlm",
            {"pretrained_xlm_checkpoint": "x"},
            "the argument pretrained_xlm_checkpoint",
        ),
        (
            "transformer",
            {"activation_fn": "relu.pt"},
            "the argument activation_fn is 'relu.pt', which is not built from",
        ),
        ("transformer", {"activation_fn": "/etc/passwd"}, "the argument activation_fn is '/etc/passwd'"),
        ("fconv", {"encoder_layers": "exit()"}, "the argument encoder_layers is 'exit()', which is not built from"),
        ("fconv", {"encoder_layers": "[(512, 3)] * 99999"}, "the argument encoder_layers is"),
        ("fconv", {"encoder_layers": "[(9**9**9, 3)]"}, "the argument encoder_layers is"),
        ("fconv", {"encoder_layers": "[(512, 3)]\n"}, "the argument encoder_layers is"),
        ("fconv", {"encoder_layers": ["exit()"]}, "the argument encoder_layers is"),
        ("fconv", {"encoder_layers": {"a": 1}}, "the argument encoder_layers is"),
        ("transformer", {"max_source_positions": 2**20}, "the argument max_source_positions is 1048576, beyond 65536"),
    ],
)
def test_what_is_not_to_be_trusted_is_refused_by_name(folder, name, arguments, why):
    training = Training(folder, *TRANSLATION, *MODEL)
    with pytest.raises(ValueError) as refused:
        training.build({"name": name, "arguments": arguments})
    assert str(refused.value).startswith(why)
    assert "\n" not in str(refused.value)


def test_building_anothers_model_leaves_the_task_and_our_configuration_alone(folder):
    training = Training(folder, *TRANSLATION, *MODEL)
    task, flags = dict(vars(training.task)), dict(vars(training.cfg.model))
    training.build(Training(folder, *TRANSLATION, *TRANSLATORS["lstm"]).told)
    assert vars(training.task) == task
    assert vars(training.cfg.model) == flags


def test_peers_that_differ_only_in_dropout_and_in_depth_take_each_other_up(hosts):  # noqa: F811
    deep = ("--encoder-layers", "2", "--encoder-ffn-embed-dim", "24")
    others = [hosts(1, "--codistill-peers", "3", "--dropout", "0.5"), hosts(2, "--codistill-peers", "3", *deep)]
    for other in others:
        other.leave()
    host = hosts(0, "--codistill-peers", "3")
    host.take_up(2)
    _, _, log = host.step(batch(host), 30)
    assert host.codistiller.active
    assert log["codistill_loss"] > 0
    assert host.codistiller.metrics()["incidents"] == 0
