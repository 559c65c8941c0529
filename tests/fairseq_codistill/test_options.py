"""fairseq's flags: their list frozen, and for each that cannot work the exact line that the user reads."""

import math
import subprocess
import sys

import pytest
from fairseq import options

from fairseq_codistill.options import CodistillCriterionConfig, codistill_config, label_smoothing_schedule
from tests.fairseq_codistill.toy_host import Host, configure, data  # noqa: F401

PIECEWISE = "write it like 0:1e-4,18:1e-5,38:0 (from epochs completed) or 0:0.1,5000u:0 (from updates)"
WHOLE_MODELS = (
    "cannot be combined with --criterion codistill, which compares whole models by their logits; leave it out"
)

FLAGS = {
    "--codistill-dir": None,
    "--codistill-exchange": "checkpoint",
    "--codistill-rendezvous": None,
    "--codistill-topology": "all",
    "--codistill-run-id": "default",
    "--codistill-peer": 0,
    "--codistill-peers": 2,
    "--codistill-interval": 500,
    "--codistill-loss": "kl",
    "--codistill-temperature": 1.0,
    "--codistill-alpha": 1.0,
    "--codistill-alpha-growth": 1.0,
    "--codistill-alpha-every": "epoch",
    "--codistill-alpha-max": math.inf,
    "--codistill-burn-in": 0,
    "--codistill-max-staleness": 0,
    "--codistill-on-error": "continue",
    "--codistill-sync": False,
    "--codistill-timeout": 300.0,
    "--codistill-dtype": "float32",
    "--codistill-topk": 0,
    "--codistill-publish": "raw",
    "--codistill-keep": 3,
    "--codistill-weight-decay": None,
    "--codistill-label-smoothing": None,
}
DATA_FLAGS = {"--codistill-data-fraction": 1.0, "--codistill-data-seed": 0, "--codistill-data-shard": False}

BAD = [
    (
        ["--codistill-peers", "2"],
        "--codistill-dir is missing: 2 peers need a folder or bucket that all of them reach, "
        "e.g. --codistill-dir /shared/codistill or s3://bucket/path",
    ),
    (
        ["--codistill-dir", "ftp://host/path"],
        "--codistill-dir ftp://…: must be a folder or start with one of file://, s3://, gs://, az://",
    ),
    (
        ["--codistill-run-id", "../up"],
        "--codistill-run-id ../up: must be 1 to 128 letters, digits, dots, dashes or underscores, "
        "the first a letter or digit",
    ),
    (
        ["--codistill-peer", "2", "--codistill-peers", "2"],
        "--codistill-peer 2: must be between 0 and 1, since --codistill-peers is 2; number peers from 0",
    ),
    (["--codistill-peers", "0"], "--codistill-peers 0: must be between 1 and 1024"),
    (["--codistill-interval", "0"], "--codistill-interval 0: must be 1 or more"),
    (["--codistill-loss", "l1"], "--codistill-loss l1: must be one of kl, mse, ce"),
    (["--codistill-temperature", "0"], "--codistill-temperature 0.0: must be a finite number above 0"),
    (
        ["--codistill-temperature", "2", "--codistill-loss", "mse"],
        "--codistill-temperature 2.0: --codistill-loss mse compares logits and has no temperature; leave it out",
    ),
    (["--codistill-alpha", "-1"], "--codistill-alpha -1.0: must be a finite number, 0 or more"),
    (["--codistill-alpha", "nan"], "--codistill-alpha nan: must be a finite number, 0 or more"),
    (["--codistill-alpha-growth", "0"], "--codistill-alpha-growth 0.0: must be a finite number above 0"),
    (
        ["--codistill-alpha-every", "week"],
        "--codistill-alpha-every week: must be 'epoch' or a number of updates, 1 or more",
    ),
    (
        ["--codistill-alpha-max", "0.5"],
        "--codistill-alpha-max 0.5: must be at least --codistill-alpha (1.0); leave it out for no cap",
    ),
    (["--codistill-burn-in", "-1"], "--codistill-burn-in -1: must be 0 or more"),
    (["--codistill-max-staleness", "-1"], "--codistill-max-staleness -1: must be 0 or more"),
    (["--codistill-on-error", "panic"], "--codistill-on-error panic: must be one of continue, fail"),
    (["--codistill-timeout", "0"], "--codistill-timeout 0.0: must be above 0 and at most 1000000 seconds"),
    (["--codistill-dtype", "int8"], "--codistill-dtype int8: must be one of float32, bfloat16, float16"),
    (["--codistill-keep", "1"], "--codistill-keep 1: must be 2 or more"),
    (
        ["--codistill-weight-decay", "5:1"],
        f"--codistill-weight-decay 5:1: does not start at 0; {PIECEWISE}",
    ),
    (
        ["--codistill-label-smoothing", "0:0.1,soon:0"],
        f"--codistill-label-smoothing 0:0.1,soon:0: start 'soon' is not a finite number of at least 0; {PIECEWISE}",
    ),
    (["--codistill-label-smoothing", "0:0.1,5u:1"], "--codistill-label-smoothing 0:0.1,5u:1: values must be below 1"),
    (["--codistill-exchange", "gossip"], "--codistill-exchange gossip: must be one of checkpoint, prediction"),
    (
        ["--codistill-rendezvous", "host:1", "--codistill-exchange", "prediction"],
        "--codistill-rendezvous host:1: must be tcp://HOST:PORT, HOST being the machine of peer 0",
    ),
    (
        ["--codistill-rendezvous", "tcp://host:29500"],
        "--codistill-rendezvous tcp://host:29500: has no effect without --codistill-exchange prediction; "
        "add it, or leave this out",
    ),
    (
        ["--codistill-topology", "star"],
        "--codistill-topology star: must be all, ring, or random-K with a number K, such as random-2",
    ),
    (
        ["--codistill-topology", "ring", "--codistill-exchange", "prediction"],
        "--codistill-topology ring: has no meaning with --codistill-exchange prediction; leave one of them out",
    ),
    (["--codistill-topk", "-1"], "--codistill-topk -1: must be 0 or more"),
    (["--codistill-publish", "best"], "--codistill-publish best: must be one of raw, ema"),
    (
        ["--codistill-publish", "ema"],
        "--codistill-publish ema: fairseq keeps no average of the weights; add --store-ema, or publish raw",
    ),
    (["--use-bmuf"], f"--use-bmuf: {WHOLE_MODELS}"),
    (["--ddp-backend", "slowmo"], f"--ddp-backend slowmo: {WHOLE_MODELS}"),
    (["--ddp-backend", "fully_sharded"], f"--ddp-backend fully_sharded: {WHOLE_MODELS}"),
    (["--pipeline-model-parallel"], f"--pipeline-model-parallel: {WHOLE_MODELS}"),
    (["--model-parallel-size", "2"], f"--model-parallel-size above 1: {WHOLE_MODELS}"),
    (
        ["--adaptive-softmax-cutoff", "10,20"],
        f"--adaptive-softmax-cutoff (yours, or that of your --arch): {WHOLE_MODELS}",
    ),
]
NEVER_WRONG = {"--codistill-sync"}  # a switch


def offered(*selected):
    """Every flag of ours that fairseq-train has, with its default."""
    parser = options.get_training_parser()
    parsed = options.parse_args_and_arch(parser, ["data", "--arch", "transformer", *selected])
    ours = {name: value for name, value in vars(parsed).items() if name.startswith("codistill")}
    return {"--" + name.replace("_", "-"): value for name, value in ours.items()}


def test_the_flags_of_the_criterion_and_their_defaults_are_frozen():
    assert offered("--criterion", "codistill") == FLAGS


def test_the_flags_of_the_task_and_their_defaults_are_frozen():
    assert offered("--task", "codistill_translation") == DATA_FLAGS


def test_a_plain_training_is_offered_none_of_our_flags():
    assert offered("--criterion", "label_smoothed_cross_entropy") == {}


def test_every_flag_has_a_help_text():
    for item in CodistillCriterionConfig.__dataclass_fields__.values():
        if item.name.startswith("codistill"):
            assert len(item.metadata["help"]) > 20


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_bad_flag_ends_the_process_with_exactly_this_line(data, flags, message):  # noqa: F811
    place = [] if flags[0] in ("--codistill-dir", "--codistill-peers") else ["--codistill-dir", str(data)]
    with pytest.raises(SystemExit) as ended:
        Host(data, *place, *flags)
    assert ended.value.code == message


def test_every_flag_that_can_be_wrong_is_in_the_table():
    assert {flags[0] for flags, _ in BAD if flags[0].startswith("--codistill")} == FLAGS.keys() - NEVER_WRONG | {
        "--codistill-dir"
    }


def test_what_is_typed_arrives_in_the_core(data):  # noqa: F811
    flags = [
        *("--codistill-dir", "s3://bucket/path", "--codistill-run-id", "run-7", "--codistill-peer", "2"),
        *("--codistill-peers", "3", "--codistill-interval", "7", "--codistill-loss", "ce"),
        *("--codistill-temperature", "2", "--codistill-alpha", "0.5", "--codistill-alpha-growth", "1.5"),
        *("--codistill-alpha-every", "100", "--codistill-alpha-max", "4", "--codistill-burn-in", "8"),
        *("--codistill-max-staleness", "70", "--codistill-on-error", "fail", "--codistill-sync"),
        *("--codistill-timeout", "5", "--codistill-dtype", "bfloat16", "--codistill-keep", "4"),
        *("--codistill-weight-decay", "0:1e-4,3:0", "--codistill-label-smoothing", "0:0.1,50u:0"),
        *("--codistill-topology", "random-2", "--codistill-publish", "ema"),
    ]
    criterion = configure(data, *flags).criterion
    found = codistill_config(criterion)
    assert vars(found) == {
        **{"dir": "s3://bucket/path", "run_id": "run-7", "peer": 2, "peers": 3, "interval": 7, "loss": "ce"},
        **{"temperature": 2.0, "alpha": 0.5, "alpha_growth": 1.5, "alpha_every": "100", "alpha_max": 4.0},
        **{"burn_in": 8, "max_staleness": 70, "on_error": "fail", "sync": True, "timeout": 5.0},
        **{"dtype": "bfloat16", "keep": 4, "weight_decay": "0:1e-4,3:0"},
        **{"exchange": "checkpoint", "rendezvous": None, "topology": "random-2", "topk": 0, "publish": "ema"},
    }
    assert label_smoothing_schedule(criterion).values == (0.1, 0.0)


def test_what_is_typed_for_exchange_by_prediction_arrives_in_the_core(data):  # noqa: F811
    place = ("--codistill-rendezvous", "tcp://host-7.example:29500")
    typed = configure(data, "--codistill-exchange", "prediction", *place, "--codistill-topk", "8")
    assert codistill_config(typed.criterion).changed() == {
        **{"exchange": "prediction", "rendezvous": "tcp://host-7.example:29500", "topk": 8}
    }


def test_importing_the_options_does_not_start_threads_or_touch_random_numbers():
    script = (
        "import threading, torch, random, numpy, fairseq.tasks, fairseq.criterions\n"
        "def states(): return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()\n"
        "before, threads = states(), threading.active_count()\n"
        "import fairseq_codistill\n"
        "assert states() == before and threading.active_count() == threads\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True, timeout=120)
