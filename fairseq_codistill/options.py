"""fairseq's flags for the codistillation options, generated from `codistill.CodistillConfig`.

A flag's value is judged by `CodistillConfig` alone, so that the command line and a YAML file get the same one-line
answer.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig
from fairseq.models import ARCH_MODEL_NAME_REGISTRY

from codistill import CodistillConfig, ConfigError, Piecewise

PREFIX = "codistill_"


def option_fields(options: type) -> list[tuple[str, Any, Any]]:
    """The fields of a class of the core's options, as `dataclasses.make_dataclass` and fairseq's parser want them."""
    hints = typing.get_type_hints(options)
    made = []
    for item in dataclasses.fields(options):
        choices = item.metadata["choices"]
        text = item.metadata["help"] + (f" (one of {', '.join(choices)})" if choices else "")
        made.append((PREFIX + item.name, hints[item.name], field(default=item.default, metadata={"help": text})))
    return made


_Options = dataclasses.make_dataclass(
    "_Options", option_fields(CodistillConfig), bases=(LabelSmoothedCrossEntropyCriterionConfig,)
)


@dataclass
class CodistillCriterionConfig(_Options):  # type: ignore[misc, valid-type]
    """Everything `label_smoothed_cross_entropy` has, and every `--codistill-…` option."""

    codistill_label_smoothing: Optional[str] = field(
        default=None,
        metadata={
            "help": "piecewise label smoothing of the training loss, e.g. '0:0.1,20:0': from that many epochs done "
            "on ('5000u': updates); the loss that is logged, and validation, keep --label-smoothing"
        },
    )


def codistill_config(cfg: Any) -> CodistillConfig:
    """The core's options out of a criterion's configuration.

    Raises:
        ConfigError: when a value is not allowed.
    """
    return CodistillConfig(**{f.name: getattr(cfg, PREFIX + f.name) for f in dataclasses.fields(CodistillConfig)})


def label_smoothing_schedule(cfg: Any) -> Optional[Piecewise]:
    """The piecewise label smoothing, or None.

    Raises:
        ConfigError: when it is malformed, or a value is not below 1.
    """
    schedule = CodistillConfig.piecewise("label_smoothing", cfg.codistill_label_smoothing)
    if schedule is not None and max(schedule.values) >= 1:
        raise ConfigError(f"--codistill-label-smoothing {cfg.codistill_label_smoothing}: values must be below 1")
    return schedule


_REFUSED = (  # where in fairseq's configuration, whether its value stands in the way, what to leave out
    ("optimization", "use_bmuf", bool, "--use-bmuf"),
    ("distributed_training", "ddp_backend", lambda value: value == "slowmo", "--ddp-backend slowmo"),
    ("distributed_training", "ddp_backend", lambda value: value == "fully_sharded", "--ddp-backend fully_sharded"),
    ("distributed_training", "pipeline_model_parallel", bool, "--pipeline-model-parallel"),
    ("common", "model_parallel_size", lambda value: value > 1, "--model-parallel-size above 1"),
    (
        *("model", "adaptive_softmax_cutoff", lambda value: value is not None),
        "--adaptive-softmax-cutoff (yours, or that of your --arch)",
    ),
)
_IGNORE_CUTOFF = ("lstm", "lstm_lm", "fconv_lm")  # they have one by default, and use it with adaptive_loss alone


def refuse_host_options(root: Any, config: CodistillConfig) -> None:
    """Turn away fairseq options under which a peer has no complete weights, no logits, or nothing of what is asked for.

    Raises:
        ConfigError: naming the option.
    """
    model = ARCH_MODEL_NAME_REGISTRY.get(getattr(getattr(root, "model", None), "_name", None))
    for group, name, in_the_way, spelling in _REFUSED:
        value = getattr(getattr(root, group, None), name, None)
        if name == "adaptive_softmax_cutoff" and model in _IGNORE_CUTOFF:
            continue
        if value is not None and in_the_way(value):
            raise ConfigError(
                f"{spelling}: cannot be combined with --criterion codistill, which compares whole models "
                "by their logits; leave it out"
            )
    if config.publish == "ema" and not getattr(getattr(root, "ema", None), "store_ema", False):
        raise config.error("publish", "fairseq keeps no average of the weights; add --store-ema, or publish raw")
