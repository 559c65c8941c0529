"""`--codistill-publish ema`: what is published are the averaged weights that fairseq keeps with `--store-ema`.

The trainer hands its average to a task that says `uses_ema`, to `train_step` and to `valid_step`; the task's own
methods get it only if the task itself asked. It is asked for after the first update, when fairseq has made it: made
earlier it would be another average. Until it is at hand the model's own weights are published: after one update they
are the average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor, nn


class Average:
    """fairseq's moving average of the weights, as the trainer hands it over."""

    def __init__(self, task: Any) -> None:
        """Take the place of `valid_step` on `task`."""
        self._task = task
        self._wanted_by_task = bool(getattr(task, "uses_ema", False))
        self._host_valid_step = task.valid_step
        self._model: Optional[nn.Module] = None
        task.valid_step = self._valid_step

    def ask(self, update: int) -> None:
        """Have it handed over from the next update on; `update` updates are done."""
        if update > 0:
            self._task.uses_ema = True

    def take(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keep the average among the trainer's keyword arguments; gives those that the task's own method gets."""
        self._model = given.get("ema_model", self._model)
        return given if self._wanted_by_task else {key: value for key, value in given.items() if key != "ema_model"}

    def state(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The averaged weights under the names that `model` has for its own; its own where fairseq lost some."""
        averaged = {} if self._model is None else self._model.state_dict()
        own = model.state_dict()
        return {name: averaged.get(name, value) for name, value in own.items() if isinstance(value, Tensor)}

    def _valid_step(self, *arguments: Any, **given: Any) -> Any:
        return self._host_valid_step(*arguments, **self.take(given))
