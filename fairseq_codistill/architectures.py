"""What our model is, in words that another peer can build it from: its name in fairseq's registry and its arguments.

Told are plain values of the arguments that the model itself defines; nothing of this machine (paths, files), of the
training (seeds, workers) or of the data is among them, so that two peers started with the same flags say the same.
A peer's words are not trusted: fairseq evaluates some arguments as Python, and reads files that others name. A model is
built from fairseq's registry or not at all; an argument that it does not define, one that may name a file, and text
that is more than a word, numbers or a list of layers, are refused. It may be built in a thread: no random number of
this process is drawn.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch
from fairseq.dataclass.utils import _set_legacy_defaults
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

BYTES = 15 * 1024  # of JSON; a manifest takes 16 KiB

_FROM_TASK = ("max_source_positions", "max_target_positions", "tokens_per_sample")  # they size a model, too
_LARGEST = 2**20  # no number beyond is told: a peer would refuse it, and those that are mean "never"
_LONGEST = 2**16  # most positions: tables of them are made beside the parameters
_OF_A_FILE = re.compile(r"path|file|checkpoint|pretrained|load_|restore|url|w2v|(^|_)(dir|data)(_|$)")
_WORD = r"[A-Za-z][A-Za-z0-9_-]{0,63}"
_NUMBER = r"-?[0-9]{1,6}(\.[0-9]{1,6})?"
_NUMBERS = rf"{_NUMBER}( ?, ?{_NUMBER}){{0,63}}"
_LAYERS = rf"\[\({_NUMBERS}\)( ?, ?\({_NUMBERS}\)){{0,63}}\]( \* [0-9]{{1,2}})?"  # [(512, 3)] * 9, as in fconv
_TEXT = re.compile(rf"{_WORD}|\[?{_NUMBERS}\]?|{_LAYERS}( \+ {_LAYERS}){{0,15}}|")


def architecture(model: Any) -> Optional[dict[str, Any]]:
    """The registry name and arguments of a model's configuration, as a manifest tells them; None when it has none."""
    name = _name(model)
    if not name:
        return None
    values = _flat(model)
    told = {key: _plain(values[key]) for key in sorted(_defined(name)) if key in values}
    arguments = {key: value for key, value in told.items() if _can_be_told(key, value)}
    if len(json.dumps(arguments)) > BYTES:
        arguments = {}
    return {"name": name, "arguments": arguments}


def build_unlike(name: str, arguments: Mapping[str, Any], task: Any, root: Any) -> nn.Module:
    """A model of fairseq's registry, built with a copy of our task wherever torch's default device is.

    Args:
        name: of an architecture.
        arguments: of the model; what is not among them is as fairseq has it.
        task: ours.
        root: our whole configuration: what is of the data or the training is taken from there.

    Raises:
        ValueError: an unknown name, an argument that the model does not define, a value that is not to be trusted.
    """
    if name not in ARCH_MODEL_REGISTRY:
        raise ValueError("fairseq has no model of that name here")
    known = _defined(name)
    for key, value in arguments.items():
        if key not in known or _OF_A_FILE.search(key):
            raise ValueError(f"the argument {key:.60} is not one of this model's")
        if not _is_safe(value):
            raise ValueError(f"the argument {key} is {value!r:.60}, which is not built from")
        if key in _FROM_TASK and isinstance(value, int) and value > _LONGEST:
            raise ValueError(f"the argument {key} is {value}, beyond {_LONGEST}")
    build = _structured if _dataclass(name) else _namespace
    with _OwnGenerator():
        return copy.copy(task).build_model(build(name, arguments, root))


class _OwnGenerator(TorchDispatchMode):
    """In this thread, initial weights are drawn with a generator apart.

    Most are not drawn at all on the meta device, but some constructors of fairseq's know no device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        draws = torch.Tag.nondeterministic_seeded in func.tags and func.overloadpacket.__name__.endswith("_")
        if draws and args[0].device.type == "cpu" and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def _name(model: Any) -> str:
    return str(getattr(model, "_name", None) or getattr(model, "arch", None) or "")


def _defined(name: str) -> set[str]:
    """The arguments that the model of an architecture defines."""
    if name not in ARCH_MODEL_REGISTRY:
        return set()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ARCH_MODEL_REGISTRY[name].add_args(parser)
    return {action.dest for action in parser._actions} | set(_FROM_TASK)


def _dataclass(name: str) -> Optional[type]:
    found: Optional[type] = getattr(ARCH_MODEL_REGISTRY[name], "__dataclass", None)
    return found


def _namespace(name: str, arguments: Mapping[str, Any], root: Any) -> argparse.Namespace:
    """The configuration of a model without a dataclass: all options in one, but for those of our own model."""
    ours = root.model
    own = _name(ours)
    of_model = _defined(own) | set(vars(_completed(own, {}))) if own in ARCH_MODEL_REGISTRY else set()
    others = {**_options(root), **_flat(ours)}
    return _completed(
        name,
        {**{key: value for key, value in others.items() if key not in of_model}, **copy.deepcopy(dict(arguments))},
    )


def _completed(name: str, values: Mapping[str, Any]) -> argparse.Namespace:
    """The flags of an architecture with its defaults, as fairseq's parser makes them."""
    made = argparse.Namespace(**{**values, "_name": name, "arch": name})
    _set_legacy_defaults(made, ARCH_MODEL_REGISTRY[name])
    ARCH_CONFIG_REGISTRY[name](made)
    return made


def _options(root: Any) -> dict[str, Any]:
    """Every option but the model's, in one."""
    found: dict[str, Any] = {}
    for group, options in root.items():
        if group != "model" and (OmegaConf.is_config(options) or isinstance(options, argparse.Namespace)):
            found.update(_flat(options), **{group: getattr(options, "_name", None)})
    return found


def _structured(name: str, arguments: Mapping[str, Any], root: Any) -> DictConfig:
    """The configuration of a model with a dataclass; fields that stand for an option elsewhere are as we have them."""
    values = {key: _elsewhere(value, root) for key, value in dataclasses.asdict(_dataclass(name)()).items()}  # type: ignore[misc]
    return OmegaConf.create({**values, **copy.deepcopy(dict(arguments)), "_name": name})


def _elsewhere(value: Any, root: Any) -> Any:
    place = re.fullmatch(r"\$\{(\w+)\.(\w+)\}", value) if isinstance(value, str) else None
    return value if place is None else getattr(getattr(root, place[1], None), place[2], None)


def _flat(model: Any) -> dict[str, Any]:
    """A configuration's values; what YAML nests (`encoder: {layers: 1}`) under the name of its flag."""
    if isinstance(model, argparse.Namespace):
        return dict(vars(model))
    values: Any = OmegaConf.to_container(model, resolve=True, enum_to_str=True)
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if not key.startswith(tuple(f"{part}_" for part in nested))}
    for part, inner in nested.items():
        flat.pop(part)
        flat.update({f"{part}_{key}": value for key, value in inner.items()})
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _can_be_told(key: str, value: Any) -> bool:
    return not _OF_A_FILE.search(key) and all(
        item is None
        or (isinstance(item, (int, float)) and -_LARGEST <= item <= _LARGEST)
        or (isinstance(item, str) and len(item) <= 500 and "/" not in item and "\\" not in item)
        for item in _items(value)
    )


def _is_safe(value: Any) -> bool:
    return all(
        item is None or isinstance(item, (int, float)) or (isinstance(item, str) and _TEXT.fullmatch(item) is not None)
        for item in _items(value)
    )


def _items(value: Any) -> Iterator[Any]:
    """The scalars of a value; a list may hold lists."""
    if isinstance(value, list):
        for item in value:
            yield from _items(item)
    else:
        yield value
