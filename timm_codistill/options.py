"""The codistillation options as flags of an argparse parser, and back.

Flags and their help come from `CodistillConfig` and `DataConfig`. train.py takes values from a YAML file past argparse,
so each is judged again here, whichever way it came: a bad one is one line, without the parser's page of usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator
from typing import Any, Optional

from codistill import CodistillConfig, ConfigError, DataConfig, flag

SWITCH = "codistill"
PREFIX = "codistill_"
_WANTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_REFUSED = (  # where in train.py's arguments, its flag, why not
    ("naflex_loader", "--naflex-loader", "its batches are not images of one size"),
    ("kd_model_name", "--kd-model-name", "it distils from a fixed network with a task of its own"),
    ("torchscript", "--torchscript", "a scripted model has no eager twin for a peer's weights"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--codistill` and every `--codistill-…` flag to `parser`."""
    group = parser.add_argument_group("Codistillation")
    group.add_argument(
        "--codistill", action="store_true", default=False, help="codistil with the other peers of a run (default: off)"
    )
    for kind, item in _options():
        text = item.metadata["help"].replace("%", "%%") + " (default: %(default)s)"
        choices = item.metadata["choices"]
        if kind is bool:
            group.add_argument(flag(item.name), action="store_true", default=item.default, help=text)
        else:
            metavar = "{" + ",".join(choices) + "}" if choices else _METAVARS[kind]
            converted = _converter(item.name, kind)
            group.add_argument(flag(item.name), default=item.default, type=converted, metavar=metavar, help=text)


def codistill_config(args: argparse.Namespace) -> Optional[CodistillConfig]:
    """The codistillation that `args` ask for; None without `--codistill`.

    Raises:
        ConfigError: a value is not allowed, an option does not exist, or options were given without `--codistill`.
    """
    _refuse_unknown(args)
    if not args.codistill:
        _refuse_without_switch(args)
        return None
    return CodistillConfig(**_values(args, CodistillConfig))


def data_config(args: argparse.Namespace) -> DataConfig:
    """Which part of the training set `args` ask for.

    Raises:
        ConfigError: when a value is not allowed.
    """
    return DataConfig(**_values(args, DataConfig))


def refuse_host_options(args: argparse.Namespace, config: Optional[CodistillConfig] = None) -> None:
    """Turn away options of train.py that cannot work together with `--codistill`, or with what `config` asks for.

    Raises:
        ConfigError: naming the option.
    """
    if config is not None and config.coordinated and getattr(args, "use_multi_epochs_loader", None):
        raise ConfigError(
            f"--use-multi-epochs-loader: cannot be combined with {flag('exchange')} prediction: its workers outlive an "
            "epoch, and a peer that comes later would not draw as they do; leave one of them out"
        )
    for name, spelling, reason in _REFUSED:
        if getattr(args, name, None):
            raise ConfigError(f"{spelling}: cannot be combined with --codistill: {reason}; leave one of them out")
    task = getattr(args, "task", None)  # from timm 1.0.31
    if task not in (None, "classification"):
        raise ConfigError(
            f"--task {task}: cannot be combined with --codistill: peers are compared as distributions over classes; "
            "leave one of them out"
        )


def _options() -> Iterator[tuple[type, Any]]:
    """Each option's type and dataclass field."""
    for options in (CodistillConfig, DataConfig):
        hints = typing.get_type_hints(options)
        for item in dataclasses.fields(options):
            kinds = [kind for kind in typing.get_args(hints[item.name]) if kind is not type(None)]
            yield (kinds or [hints[item.name]])[0], item


def _converter(name: str, kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return _judged(name, kind, text)
        except ConfigError as error:
            raise SystemExit(str(error)) from None

    return convert


def _judged(name: str, kind: type, value: Any) -> Any:
    """`value`, from a command line or a YAML file, as a `kind`."""
    try:
        if isinstance(value, str) and kind is not bool:
            return kind(value)
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        if kind in (str, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
            return kind(value)
    except ValueError:
        pass
    raise ConfigError(f"{flag(name)} {value}: must be {_WANTED[kind]}")


def _values(args: argparse.Namespace, options: type) -> dict[str, Any]:
    wanted = {item.name for item in dataclasses.fields(options)}
    found = {}
    for kind, item in _options():
        if item.name in wanted:
            value = getattr(args, PREFIX + item.name)
            found[item.name] = None if value is None and item.default is None else _judged(item.name, kind, value)
    return found


def _refuse_unknown(args: argparse.Namespace) -> None:
    known = [SWITCH, *(PREFIX + item.name for _, item in _options())]
    for name in vars(args):
        if name.startswith(SWITCH) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help for those that do"
            raise ConfigError(f"{name} in the config file: no such option exists; {hint}")
    if not isinstance(args.codistill, bool):
        raise ConfigError(f"--codistill {args.codistill}: must be {_WANTED[bool]}")


def _refuse_without_switch(args: argparse.Namespace) -> None:
    for _, item in _options():
        if getattr(args, PREFIX + item.name) != item.default:
            raise ConfigError(
                f"{flag(item.name)}: has no effect without --codistill, which switches codistillation on; "
                "add --codistill, or leave this out"
            )
