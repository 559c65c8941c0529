"""Piecewise weight decay on any torch optimiser's parameter groups; groups that had none keep none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from codistill.config import ConfigError, flag
from codistill.schedules import Piecewise


class WeightDecay:
    """Sets a scheduled weight decay.

    Attributes:
        decaying: for each group, whether it had any when first seen. Belongs into checkpoints: a schedule may have
            set all groups to 0 by the time one is written. What was kept of another number of groups is forgotten.
    """

    def __init__(self, schedule: Piecewise) -> None:
        """Groups are looked at when the schedule is first applied."""
        self._schedule = schedule
        self.decaying: Optional[list[bool]] = None

    def apply(self, groups: Sequence[dict[str, Any]], update: int, epochs: float) -> None:
        """Set the value for `update` updates and `epochs` epochs done.

        Raises:
            ConfigError: no group has any weight decay to schedule.
        """
        if self.decaying is None or len(self.decaying) != len(groups):
            self.decaying = [group.get("weight_decay", 0.0) != 0 for group in groups]
        if not any(self.decaying):
            raise ConfigError(
                f"{flag('weight-decay')}: --weight-decay is 0, so no parameter has any; "
                "give --weight-decay any value above 0, which the schedule then replaces"
            )
        value = self._schedule.at(update=update, epochs=epochs)
        for group, decays in zip(groups, self.decaying, strict=True):
            if decays:
                group["weight_decay"] = value
