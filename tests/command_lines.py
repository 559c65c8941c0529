"""What the hosts make of a command line: their own parsers with our flags in them, judged as the plug-ins judge them.

For train.py that is our stand-in's parser with the flags it lacks, or an upstream one's.
"""

import argparse
import functools
import importlib.util
from pathlib import Path

import yaml
from fairseq import options

import fairseq_codistill  # noqa: F401  (importing registers the criterion)
from codistill import CodistillConfig
from fairseq_codistill.options import codistill_config as fairseq_config
from fairseq_codistill.options import label_smoothing_schedule
from tests.integration.timm_trainings import STAND_IN
from timm_codistill.options import add_arguments, data_config, refuse_host_options
from timm_codistill.options import codistill_config as timm_config

LACKING = {  # flags that our stand-in for train.py has not
    "--lr-base": float,
    "--lr-base-size": int,
    "--lr-base-scale": str,
    "--crop-pct": float,
    "--interpolation": str,
    "--train-interpolation": str,
}


def train_script(path):
    """A train.py as a module; its parser is left as it is."""
    spec = importlib.util.spec_from_file_location("train_of_the_recipes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def stand_in():
    return train_script(STAND_IN)


def timm_arguments(module, flags):
    """The flags behind `timm-codistill TRAIN.PY`, as train.py's module and we take them."""
    parser = argparse.ArgumentParser(parents=[module.parser], conflict_handler="resolve", allow_abbrev=False)
    add_arguments(parser)
    if module.__file__ == STAND_IN:
        for flag, kind in LACKING.items():
            parser.add_argument(flag, type=kind)
    config, rest = module.config_parser.parse_known_args(flags)
    if config.config:
        parser.set_defaults(**yaml.safe_load(Path(config.config).read_text(encoding="utf-8")))
    args = parser.parse_args(rest)
    refuse_host_options(args, timm_config(args))
    data_config(args)
    return args


def fairseq_arguments(flags):
    """The flags behind `fairseq-train`, with `--criterion codistill` among them."""
    args = options.parse_args_and_arch(options.get_training_parser(), list(flags))
    assert isinstance(fairseq_config(args), CodistillConfig)
    label_smoothing_schedule(args)
    return args
