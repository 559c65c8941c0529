"""What a peer's model is: like ours, or what the registry name and arguments in its manifest build. Nothing else is.

A peer's word is not trusted: arguments are plain JSON, the model is first built without storage (on the meta device),
no larger than `TIMES_OURS` times ours, and whatever goes wrong refuses that snapshot by the architecture's name.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from codistill.exchange.checkpoint.lean import lean
from codistill.exchange.errors import Refused
from codistill.exchange.snapshot import Template, tensors_of
from codistill.random_state import untouched_generators
from codistill.text import first_line, printable

TIMES_OURS = 32  # most values in a peer's model, in those of ours
MODULES = 100_000  # most modules in it
KINDS = 64  # kept at a time: a peer may say something new with every snapshot
LARGEST = 2**20  # no number among the arguments may be larger: a constructor may loop before it makes anything

Architecture = Mapping[str, Any]  # name: of a registry; arguments: JSON


class _TooLarge(RuntimeError):
    """Raised out of a constructor that makes more than is allowed."""


class Architectures:
    """Builds peers' models, and knows what their snapshots must look like.

    Args:
        build_peer: Gives a module like ours, where ours is.
        state: Our own model's state.
        dtype: Wire dtype that the run agreed on.
        own: Registry name and arguments of our own model, if known.
        build_unlike: Gives the module of a registry name and arguments, wherever torch's default device is; None: peers
            must be like ours. Raises whatever it likes for one that it cannot or will not build.
        place: Takes such a module to our device, precision and memory format.

    Raises:
        ValueError: For a state that no snapshot can carry.
    """

    def __init__(
        self,
        build_peer: Callable[[], nn.Module],
        state: Mapping[str, Tensor],
        dtype: str,
        own: Optional[Architecture] = None,
        build_unlike: Optional[Callable[[str, Mapping[str, Any]], nn.Module]] = None,
        place: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        _watch_constructors()
        self._build_peer, self._build_unlike, self._place = build_peer, build_unlike, place
        self._dtype, self._own = dtype, own
        self._values = TIMES_OURS * sum(tensor.numel() for tensor in state.values())
        self._like_ours = Template(state, dtype)
        self._unlike: dict[str, Template] = {}

    def differ(self, one: Optional[Architecture], other: Optional[Architecture]) -> bool:
        """Whether these are two; one that is not told is taken for ours."""
        ours = self._own
        return ours is not None and _text(ours if one is None else one) != _text(ours if other is None else other)

    def template(self, architecture: Optional[Architecture]) -> Template:
        """What a snapshot of this architecture must look like; from any thread.

        Raises:
            Refused: "architecture", when it cannot be built here.
        """
        if architecture is None or not self.differ(architecture, None):
            return self._like_ours
        known = self._unlike.get(_text(architecture))
        if known is None:
            with self._refusing(architecture), torch.device("meta"), _bounded(self._values):
                known = Template(tensors_of(self._built(architecture)), self._dtype)
            if len(self._unlike) >= KINDS:
                self._unlike.clear()
            self._unlike[_text(architecture)] = known
        return known

    def build(self, architecture: Optional[Architecture]) -> nn.Module:
        """A module of this architecture, ready to take a snapshot and to predict; draws no random number.

        Raises:
            Refused: "architecture", when it cannot be built here.
        """
        with untouched_generators():
            if architecture is None or not self.differ(architecture, None):
                module = self._build_peer()
            else:
                with self._refusing(architecture):
                    module = self._place(self._built(architecture))
        return lean(module.eval().requires_grad_(False))

    def _built(self, architecture: Architecture) -> nn.Module:
        name, arguments = architecture.get("name"), architecture.get("arguments")
        if self._build_unlike is None:
            raise ValueError("this training takes only peers like its own model")
        if not isinstance(name, str) or not isinstance(arguments, Mapping) or len(architecture) != 2:
            raise ValueError("not a name and arguments")
        if any(not -LARGEST <= number <= LARGEST for number in _numbers(arguments)):
            raise ValueError(f"a number beyond {LARGEST} among its arguments")
        return self._build_unlike(name, arguments)

    @contextlib.contextmanager
    def _refusing(self, architecture: Architecture) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = str(architecture.get("name"))
            why = f"{type(error).__name__}: {first_line(error)}"
            message = f"its model {name:.60} cannot be built here: {why}"
            raise Refused("architecture", printable(message)) from error


def _text(architecture: Optional[Architecture]) -> str:
    return json.dumps(architecture, sort_keys=True, default=dict)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


_allowed = threading.local()  # what constructors in this thread may still make, while they are bounded


@contextlib.contextmanager
def _bounded(values: int) -> Iterator[None]:
    """Let this thread's constructors make at most so many values and `MODULES` modules."""
    _allowed.left = {"values": values, "modules": MODULES}
    try:
        yield
    finally:
        _allowed.left = None


@functools.cache
def _watch_constructors() -> None:
    """Once, and for good: torch's lists of hooks must not change while another thread makes modules."""

    def count(_: nn.Module, name: str, made: Any) -> None:
        left = getattr(_allowed, "left", None)
        if left is None or made is None:
            return
        kind, number = ("values", made.numel()) if isinstance(made, Tensor) else ("modules", 1)
        left[kind] -= number
        if left[kind] < 0:
            raise _TooLarge(f"it has more than {TIMES_OURS} times the values of ours, or more than {MODULES} modules")

    register_module_parameter_registration_hook(count)
    register_module_buffer_registration_hook(count)
    register_module_module_registration_hook(count)
