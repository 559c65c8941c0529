"""Every option: its name and default frozen, and for each bad value the exact line that the user reads."""

import dataclasses
import math
from typing import Any

import pytest

from codistill import CodistillConfig, ConfigError, flag
from codistill.config import LOSSES, STALE_INTERVALS

INF, NAN = math.inf, math.nan
PIECEWISE = "write it like 0:1e-4,18:1e-5,38:0 (from epochs completed) or 0:0.1,5000u:0 (from updates)"
RUN_ID = "must be 1 to 128 letters, digits, dots, dashes or underscores, the first a letter or digit"

DEFAULTS = {
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
    "--codistill-alpha-max": INF,
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
}
CHOICES = {
    "--codistill-exchange": ("checkpoint", "prediction"),
    "--codistill-loss": LOSSES,
    "--codistill-on-error": ("continue", "fail"),
    "--codistill-dtype": ("float32", "bfloat16", "float16"),
    "--codistill-publish": ("raw", "ema"),
}

BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"dir": None},
        "--codistill-dir is missing: 2 peers need a folder or bucket that all of them reach, "
        "e.g. --codistill-dir /shared/codistill or s3://bucket/path",
    ),
    (
        {"dir": "  ", "peers": 3},
        "--codistill-dir is missing: 3 peers need a folder or bucket that all of them reach, "
        "e.g. --codistill-dir /shared/codistill or s3://bucket/path",
    ),
    (
        {"dir": "ftp://user:password@host/path"},
        "--codistill-dir ftp://…: must be a folder or start with one of file://, s3://, gs://, az://",
    ),
    ({"exchange": "gossip"}, "--codistill-exchange gossip: must be one of checkpoint, prediction"),
    (
        {"exchange": "prediction", "rendezvous": "host:29500"},
        "--codistill-rendezvous host:29500: must be tcp://HOST:PORT, HOST being the machine of peer 0",
    ),
    (
        {"exchange": "prediction", "rendezvous": "tcp://host:70000"},
        "--codistill-rendezvous tcp://host:70000: must be tcp://HOST:PORT, HOST being the machine of peer 0",
    ),
    (
        {"rendezvous": "tcp://host:29500"},
        "--codistill-rendezvous tcp://host:29500: has no effect without --codistill-exchange prediction; add it, or "
        "leave this out",
    ),
    (
        {"topology": "star"},
        "--codistill-topology star: must be all, ring, or random-K with a number K, such as random-2",
    ),
    (
        {"topology": "random-0"},
        "--codistill-topology random-0: must be all, ring, or random-K with a number K, such as random-2",
    ),
    (
        {"topology": "ring", "exchange": "prediction"},
        "--codistill-topology ring: has no meaning with --codistill-exchange prediction; leave one of them out",
    ),
    (
        {"sync": True, "exchange": "prediction"},
        "--codistill-sync True: has no meaning with --codistill-exchange prediction; leave one of them out",
    ),
    ({"publish": "mean"}, "--codistill-publish mean: must be one of raw, ema"),
    (
        {"publish": "ema", "exchange": "prediction"},
        "--codistill-publish ema: has no meaning with --codistill-exchange prediction; leave one of them out",
    ),
    (
        {"keep": 4, "exchange": "prediction"},
        "--codistill-keep 4: has no meaning with --codistill-exchange prediction; leave one of them out",
    ),
    (
        {"max_staleness": 1000, "exchange": "prediction"},
        "--codistill-max-staleness 1000: has no meaning with --codistill-exchange prediction; leave one of them out",
    ),
    ({"exchange": "prediction", "topk": -1}, "--codistill-topk -1: must be 0 or more"),
    (
        {"topk": 8},
        "--codistill-topk 8: has no effect without --codistill-exchange prediction; add it, or leave this out",
    ),
    (
        {"exchange": "prediction", "topk": 8, "loss": "mse"},
        "--codistill-topk 8: --codistill-loss mse compares all logits; leave it out, or choose kl or ce",
    ),
    ({"run_id": ""}, f"--codistill-run-id : {RUN_ID}"),
    ({"run_id": "../up"}, f"--codistill-run-id ../up: {RUN_ID}"),
    ({"run_id": ".hidden"}, f"--codistill-run-id .hidden: {RUN_ID}"),
    ({"run_id": "a" * 129}, f"--codistill-run-id {'a' * 129}: {RUN_ID}"),
    (
        {"peer": 2},
        "--codistill-peer 2: must be between 0 and 1, since --codistill-peers is 2; number peers from 0",
    ),
    (
        {"peer": -1},
        "--codistill-peer -1: must be between 0 and 1, since --codistill-peers is 2; number peers from 0",
    ),
    ({"peers": 0}, "--codistill-peers 0: must be between 1 and 1024"),
    ({"peers": 1025}, "--codistill-peers 1025: must be between 1 and 1024"),
    ({"interval": "5"}, "--codistill-interval '5': must be a whole number"),
    ({"interval": True}, "--codistill-interval True: must be a whole number"),
    ({"interval": 2.5}, "--codistill-interval 2.5: must be a whole number"),
    ({"alpha": "high"}, "--codistill-alpha 'high': must be a number"),
    ({"alpha_every": 100}, "--codistill-alpha-every 100: must be text"),
    ({"weight_decay": 1e-4}, "--codistill-weight-decay 0.0001: must be text"),
    ({"sync": "yes"}, "--codistill-sync 'yes': must be true or false"),
    ({"run_id": "a\nb"}, f"--codistill-run-id 'a\\nb': {RUN_ID}"),
    ({"interval": 0}, "--codistill-interval 0: must be 1 or more"),
    ({"loss": "l1"}, "--codistill-loss l1: must be one of kl, mse, ce"),
    ({"temperature": 0.0}, "--codistill-temperature 0.0: must be a finite number above 0"),
    ({"temperature": -1.0}, "--codistill-temperature -1.0: must be a finite number above 0"),
    ({"temperature": NAN}, "--codistill-temperature nan: must be a finite number above 0"),
    ({"temperature": INF}, "--codistill-temperature inf: must be a finite number above 0"),
    (
        {"temperature": 2.0, "loss": "mse"},
        "--codistill-temperature 2.0: --codistill-loss mse compares logits and has no temperature; leave it out",
    ),
    ({"alpha": -0.5}, "--codistill-alpha -0.5: must be a finite number, 0 or more"),
    ({"alpha": NAN}, "--codistill-alpha nan: must be a finite number, 0 or more"),
    ({"alpha": INF}, "--codistill-alpha inf: must be a finite number, 0 or more"),
    ({"alpha_growth": 0.0}, "--codistill-alpha-growth 0.0: must be a finite number above 0"),
    ({"alpha_growth": NAN}, "--codistill-alpha-growth nan: must be a finite number above 0"),
    ({"alpha_every": "week"}, "--codistill-alpha-every week: must be 'epoch' or a number of updates, 1 or more"),
    ({"alpha_every": "0"}, "--codistill-alpha-every 0: must be 'epoch' or a number of updates, 1 or more"),
    ({"alpha_every": "-5"}, "--codistill-alpha-every -5: must be 'epoch' or a number of updates, 1 or more"),
    (
        {"alpha_max": 0.5},
        "--codistill-alpha-max 0.5: must be at least --codistill-alpha (1.0); leave it out for no cap",
    ),
    (
        {"alpha_max": NAN},
        "--codistill-alpha-max nan: must be at least --codistill-alpha (1.0); leave it out for no cap",
    ),
    ({"burn_in": -1}, "--codistill-burn-in -1: must be 0 or more"),
    ({"max_staleness": -1}, "--codistill-max-staleness -1: must be 0 or more"),
    (
        {"max_staleness": 499},
        "--codistill-max-staleness 499: must be 0 or at least --codistill-interval (500)",
    ),
    ({"on_error": "panic"}, "--codistill-on-error panic: must be one of continue, fail"),
    ({"timeout": 0.0}, "--codistill-timeout 0.0: must be above 0 and at most 1000000 seconds"),
    ({"timeout": INF}, "--codistill-timeout inf: must be above 0 and at most 1000000 seconds"),
    ({"timeout": 1e10}, "--codistill-timeout 10000000000.0: must be above 0 and at most 1000000 seconds"),
    ({"dtype": "int8"}, "--codistill-dtype int8: must be one of float32, bfloat16, float16"),
    ({"keep": 1}, "--codistill-keep 1: must be 2 or more"),
    (
        {"weight_decay": "5:1"},
        f"--codistill-weight-decay 5:1: does not start at 0; {PIECEWISE}",
    ),
    (
        {"weight_decay": "often"},
        f"--codistill-weight-decay often: 'often' is not START:VALUE; {PIECEWISE}",
    ),
]


def test_the_list_of_options_and_their_defaults_is_frozen():
    assert {flag(item.name): item.default for item in dataclasses.fields(CodistillConfig)} == DEFAULTS


def test_the_choices_are_frozen():
    found = {flag(item.name): item.metadata["choices"] for item in dataclasses.fields(CodistillConfig)}
    assert {name: choices for name, choices in found.items() if choices} == CHOICES


def test_every_option_has_a_help_text_of_one_line():
    texts = [item.metadata["help"] for item in dataclasses.fields(CodistillConfig)]
    assert all(text and "\n" not in text and not text.endswith(".") for text in texts)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_a_bad_value_gets_its_exact_message(changes, message):
    with pytest.raises(ConfigError) as caught:
        CodistillConfig(**{"dir": "folder", **changes})
    assert str(caught.value) == message


def test_the_table_of_bad_values_knows_every_option():
    named = {name for changes, _ in BAD for name in changes}
    assert named == {item.name for item in dataclasses.fields(CodistillConfig)}


@pytest.mark.parametrize("place", ["folder", "/some/folder", "file:///f", "s3://b/p", "gs://b", "az://c/p"])
def test_a_folder_and_every_known_scheme_are_accepted(place):
    assert CodistillConfig(dir=place).dir == place


def test_one_peer_needs_no_dir():
    assert CodistillConfig(peers=1).dir is None


@pytest.mark.parametrize(("given", "bound"), [(0, STALE_INTERVALS * 7), (7, 7), (1000, 1000)])
def test_the_staleness_bound_is_ten_intervals_unless_given(given, bound):
    assert CodistillConfig(dir="folder", interval=7, max_staleness=given).staleness_bound == bound


def test_the_schedules_come_from_the_options():
    config = CodistillConfig(dir="folder", alpha=2, alpha_growth=3, alpha_every="10", alpha_max=100, burn_in=5)
    alpha = config.alpha_schedule()
    assert [alpha.at(update, 1) for update in (5, 6, 15, 16, 26, 1000)] == [0, 2, 2, 6, 18, 100]
    decay = CodistillConfig(dir="folder", weight_decay="0:0.1,5u:0").weight_decay_schedule()
    assert decay is not None
    assert [decay.at(update=update, epochs=0) for update in (4, 5)] == [0.1, 0]
    assert config.weight_decay_schedule() is None
