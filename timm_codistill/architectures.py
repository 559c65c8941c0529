"""A timm model as other peers know it: an architecture in timm's registry, and plain arguments for `create_model`.

What a peer says is not trusted. Only models of the registry are built, never from a hub, a file or an address, without
any weights; arguments are numbers, short words and flat lists of them. Everything else raises `ValueError`.
A model that was changed after `create_model` so that the names of its weights changed, as `--split-bn` does
(`--sync-bn` does not), cannot be built from this: other kinds of peers refuse its snapshots, which costs the penalty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Optional

import timm.models
import torch
from torch import nn

NAME = re.compile(r"[A-Za-z0-9_]{1,80}(\.[A-Za-z0-9_]{1,80})?")  # architecture, tag
KEY = re.compile(r"[a-z][a-z0-9_]{0,59}")
WORD = re.compile(r"[A-Za-z0-9_+-]{0,60}")
LONGEST = 64  # of a list

# Whence weights come, how they are run, and what has no part in the prediction of an evaluated model.
_ELSEWHERE = re.compile(r"pretrained|checkpoint|cache|file|url|hub|path$|_dir$|weights$|pruned|feature")
_OTHERWISE = {"scriptable", "exportable", "no_jit", "device", "dtype"}
_IN_TRAINING = re.compile(r"drop_.*|.*drop_rate|.*drop_path_rate|bn_momentum")


def describe(model: nn.Module, given: Optional[Mapping[str, Any]] = None) -> Optional[dict[str, Any]]:
    """What other peers must be told of `model`: the same for the same flags, and after a restart.

    Args:
        model: From `timm.create_model`.
        given: The keyword arguments given there; timm from 1.0.31 on remembers them.

    Returns:
        `name`, of timm's registry, and `arguments`, as JSON has them; None for a model that they cannot describe.
    """
    known = getattr(model, "pretrained_cfg", None)
    if not isinstance(known, Mapping) or not isinstance(known.get("architecture"), str):
        return None
    name = known["architecture"]
    if known.get("tag"):  # it decides on defaults such as the size of images
        name = f"{name}.{known['tag']}"
    arguments = {**getattr(model, "_model_args", {}), **(given or {})}
    told = {key: _plain(value) for key, value in sorted(arguments.items()) if value is not None and _matters(key)}
    if isinstance(getattr(model, "num_classes", None), int):
        told["num_classes"] = model.num_classes
    return {"name": name, "arguments": told} if not _objections(name, told) else None


def build(name: str, arguments: Mapping[str, Any], classes: Optional[int]) -> nn.Module:
    """The model, without weights, that a peer has described, wherever torch's default device is.

    Args:
        name: Of timm's registry.
        arguments: For `create_model`.
        classes: How many our own model tells apart, if known.

    Raises:
        ValueError: It is none that may be built, or tells apart other classes.
    """
    for objection in _objections(name, arguments):
        raise ValueError(objection)
    model: nn.Module = timm.models.create_model(name, pretrained=False, **arguments)
    found = getattr(model, "num_classes", None)
    if classes is not None and found != classes:
        raise ValueError(f"it has {found} classes, ours has {classes}")
    return model


def place(module: nn.Module, like: nn.Module) -> nn.Module:
    """Take `module` to the device, precision and memory format of the weights of `like`."""
    first = next(like.parameters())
    module.to(device=first.device, dtype=first.dtype)
    if any(_channels_last(parameter) for parameter in like.parameters()):
        module.to(memory_format=torch.channels_last)
    return module


def _objections(name: Any, arguments: Mapping[str, Any]) -> list[str]:
    if not isinstance(name, str) or not NAME.fullmatch(name) or not timm.models.is_model(name):
        return [f"{name!r:.80} is not in the registry of timm {timm.__version__}"]
    bad = [key for key in arguments if not isinstance(key, str) or not KEY.fullmatch(key) or not _matters(key)]
    bad += [key for key, value in arguments.items() if key not in bad and not _harmless(value)]
    return [f"its argument {key!r:.80} is not taken from a peer" for key in bad]


def _matters(key: str) -> bool:
    return not (_ELSEWHERE.search(key) or key in _OTHERWISE or _IN_TRAINING.fullmatch(key))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _harmless(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return len(items) <= LONGEST and all(
        isinstance(item, (bool, int, float)) or (isinstance(item, str) and WORD.fullmatch(item)) for item in items
    )


def _channels_last(parameter: torch.Tensor) -> bool:
    if parameter.dim() != 4 or parameter.is_contiguous():
        return False
    return parameter.is_contiguous(memory_format=torch.channels_last)
