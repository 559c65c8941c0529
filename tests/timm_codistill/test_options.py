"""The flags: which there are, and how values are judged whichever way they come."""

import argparse

import pytest

from codistill import ConfigError
from timm_codistill import add_arguments
from timm_codistill.options import codistill_config, data_config, refuse_host_options

FLAGS = [
    "--codistill",
    "--codistill-alpha",
    "--codistill-alpha-every",
    "--codistill-alpha-growth",
    "--codistill-alpha-max",
    "--codistill-burn-in",
    "--codistill-data-fraction",
    "--codistill-data-seed",
    "--codistill-data-shard",
    "--codistill-dir",
    "--codistill-dtype",
    "--codistill-exchange",
    "--codistill-interval",
    "--codistill-keep",
    "--codistill-loss",
    "--codistill-max-staleness",
    "--codistill-on-error",
    "--codistill-peer",
    "--codistill-peers",
    "--codistill-publish",
    "--codistill-rendezvous",
    "--codistill-run-id",
    "--codistill-sync",
    "--codistill-temperature",
    "--codistill-timeout",
    "--codistill-topk",
    "--codistill-topology",
    "--codistill-weight-decay",
]


def parser():
    made = argparse.ArgumentParser()
    add_arguments(made)
    return made


def parse(*flags, **yaml):
    made = parser()
    made.set_defaults(**yaml)
    return made.parse_args(flags)


def test_the_flags_change_only_on_purpose():
    spellings = [spelling for action in parser()._actions for spelling in action.option_strings]
    assert sorted(set(spellings) - {"-h", "--help"}) == FLAGS


def test_the_help_shows_every_flag_with_its_default():
    text = " ".join(parser().format_help().split())
    assert all(flag in text for flag in FLAGS)
    assert "publish a snapshot, and take up new ones, every so many updates (default: 500)" in text


def test_without_the_switch_there_is_no_codistillation():
    assert codistill_config(parse()) is None


def test_the_command_line_and_a_config_file_mean_the_same():
    line = parse("--codistill", "--codistill-dir", "x", "--codistill-alpha", "2", "--codistill-alpha-every", "100")
    file = parse(codistill=True, codistill_dir="x", codistill_alpha=2, codistill_alpha_every=100)
    assert codistill_config(line) == codistill_config(file)
    assert codistill_config(file).alpha == 2.0
    assert codistill_config(file).alpha_every == "100"
    assert data_config(parse(codistill_data_fraction="0.5")).data_fraction == 0.5


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        ({"codistill_peers": 2.5}, "--codistill-peers 2.5: must be a whole number"),
        ({"codistill_peers": True}, "--codistill-peers True: must be a whole number"),
        ({"codistill_alpha": None}, "--codistill-alpha None: must be a number"),
        ({"codistill_alpha": [1]}, "--codistill-alpha [1]: must be a number"),
        ({"codistill_sync": "yes"}, "--codistill-sync yes: must be true or false"),
        ({"codistill_dir": {}}, "--codistill-dir {}: must be text"),
        ({"codistill_loss": "l2"}, "--codistill-loss l2: must be one of kl, mse, ce"),
        ({"codistill_exchange": "logits"}, "--codistill-exchange logits: must be one of checkpoint, prediction"),
        ({"codistill_publish": "swa"}, "--codistill-publish swa: must be one of raw, ema"),
        ({"codistill_topk": 2.5}, "--codistill-topk 2.5: must be a whole number"),
        (
            {"codistill_topology": "star"},
            "--codistill-topology star: must be all, ring, or random-K with a number K, such as random-2",
        ),
        (
            {"codistill_exchange": "prediction", "codistill_rendezvous": "here:1"},
            "--codistill-rendezvous here:1: must be tcp://HOST:PORT, HOST being the machine of peer 0",
        ),
        (
            {"codistill_exchange": "prediction", "codistill_publish": "ema"},
            "--codistill-publish ema: has no meaning with --codistill-exchange prediction; leave one of them out",
        ),
        (
            {"codistill_aplha": 1},
            "codistill_aplha in the config file: no such option exists; did you mean codistill_alpha?",
        ),
        ({"codistill": "on"}, "--codistill on: must be true or false"),
        (
            {"codistill": False},
            "--codistill-dir: has no effect without --codistill, which switches codistillation on; "
            "add --codistill, or leave this out",
        ),
    ],
)
def test_a_bad_value_in_a_config_file_is_one_line(yaml, line):
    with pytest.raises(ConfigError) as error:
        codistill_config(parse(**{"codistill": True, "codistill_dir": "x", **yaml}))
    assert str(error.value) == line


def test_a_shard_is_asked_for_without_a_value_and_refused_without_the_switch():
    assert data_config(parse("--codistill-data-shard")).data_shard
    assert data_config(parse(codistill_data_shard=True)).data_shard
    with pytest.raises(ConfigError, match=r"^--codistill-data-shard yes: must be true or false$"):
        data_config(parse(codistill_data_shard="yes"))
    with pytest.raises(ConfigError, match=r"^--codistill-data-shard: has no effect without --codistill, which"):
        codistill_config(parse("--codistill-data-shard"))


def test_workers_that_outlive_an_epoch_do_not_go_with_exchange_by_prediction():
    host = argparse.Namespace(use_multi_epochs_loader=True)
    config = codistill_config(parse("--codistill", "--codistill-dir", "x"))
    refuse_host_options(host, config)
    config = codistill_config(parse("--codistill", "--codistill-dir", "x", "--codistill-exchange", "prediction"))
    refuse_host_options(argparse.Namespace(use_multi_epochs_loader=False), config)
    with pytest.raises(ConfigError) as error:
        refuse_host_options(host, config)
    assert str(error.value) == (
        "--use-multi-epochs-loader: cannot be combined with --codistill-exchange prediction: its workers outlive an "
        "epoch, and a peer that comes later would not draw as they do; leave one of them out"
    )


def test_a_bad_value_on_the_command_line_is_one_line_without_the_usage(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--codistill-interval", "often")
    assert str(error.value) == "--codistill-interval often: must be a whole number"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "naflex_loader",
            True,
            "--naflex-loader: cannot be combined with --codistill: its batches are not images of one size; "
            "leave one of them out",
        ),
        (
            "kd_model_name",
            "resnet18",
            "--kd-model-name: cannot be combined with --codistill: it distils from a fixed network with a task of its "
            "own; leave one of them out",
        ),
        (
            "torchscript",
            True,
            "--torchscript: cannot be combined with --codistill: a scripted model has no eager twin for a peer's "
            "weights; leave one of them out",
        ),
        (
            "task",
            "multilabel",
            "--task multilabel: cannot be combined with --codistill: peers are compared as distributions over classes; "
            "leave one of them out",
        ),
    ],
)
def test_what_cannot_work_together_is_refused(name, value, line):
    refuse_host_options(argparse.Namespace(task="classification"))
    refuse_host_options(argparse.Namespace(**{name: None}))
    with pytest.raises(ConfigError) as error:
        refuse_host_options(argparse.Namespace(**{name: value}))
    assert str(error.value) == line
