"""What changes as training goes on: the penalty's weight and piecewise constant values.

Owns the meaning of burn-in, growth, cap and of schedules written as text. Promises: plain functions of the update and
the epoch, so that a resumed run continues on the same values; nothing overflows; text that is not a schedule is
refused in one line that shows one.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

# The weight meets float32 losses: beyond this it would become infinite there.
_LARGEST = (2.0 - 2.0**-23) * 2.0**127
_EXAMPLE = "write it like 0:1e-4,18:1e-5,38:0 (from epochs completed) or 0:0.1,5000u:0 (from updates)"


class ScheduleError(ValueError):
    """A text is not a schedule; the message says why and shows one, and leaves it to the caller to repeat the text."""


@dataclass(frozen=True)
class Alpha:
    """The penalty's weight α: 0 during burn-in, then alpha · growth^t up to cap.

    With growth, the paper's α_k = α_0 · γ^t (figure 17). Values are those that `CodistillConfig` accepts.

    Attributes:
        alpha: Weight right after burn-in, not counting growth by the epochs before it.
        burn_in: Updates at the start during which the weight is 0.
        growth: Factor γ for each step t.
        every: What t counts: "epoch" for completed epochs, or a number of updates after burn-in.
        cap: The weight never exceeds it, nor float32's largest number.
    """

    alpha: float
    burn_in: int = 0
    growth: float = 1.0
    every: str | int = "epoch"
    cap: float = math.inf

    def at(self, update: int, epoch: int) -> float:
        """Returns α for the update being computed and the epoch it is in, both counted from 1."""
        if update <= self.burn_in or self.alpha == 0:
            return 0.0
        steps = epoch - 1 if isinstance(self.every, str) else (update - self.burn_in - 1) // self.every
        try:
            grown = self.alpha * float(self.growth) ** steps
        except OverflowError:
            grown = math.inf
        return min(self.cap, _LARGEST, grown)


@dataclass(frozen=True)
class Piecewise:
    """A value that is constant between boundaries.

    Attributes:
        starts: Where each value begins, from 0, increasing.
        values: One value for each start.
        in_updates: Whether starts count updates completed, else epochs completed.
    """

    starts: tuple[float, ...]
    values: tuple[float, ...]
    in_updates: bool = False

    @classmethod
    def parse(cls, text: str) -> "Piecewise":
        """Reads ``START:VALUE,START:VALUE,…``, START in epochs completed or, with a ``u`` behind it, in updates.

        The first START is 0, in either unit.

        Raises:
            ScheduleError: The text is anything else.
        """
        starts: list[float] = []
        values: list[float] = []
        units: set[bool] = set()
        for part in text.split(","):
            boundary, colon, value = (piece.strip() for piece in part.partition(":"))
            if not colon:
                raise _refusal(f"{part.strip()!r} is not START:VALUE")
            start, in_updates = _start(boundary)
            starts.append(start)
            values.append(_number(value, "value"))
            if boundary != "0":
                units.add(in_updates)
        if starts[0] != 0:
            raise _refusal("does not start at 0")
        if len(units) > 1:
            raise _refusal("mixes epochs and updates")
        for before, after in pairwise(starts):
            if after <= before:
                raise _refusal(f"start {after:g} does not come after {before:g}")
        return cls(tuple(starts), tuple(values), True in units)

    def at(self, *, update: int, epochs: float) -> float:
        """Returns the value after so many completed updates and epochs (a fraction of an epoch counts as such)."""
        return self.values[bisect_right(self.starts, update if self.in_updates else epochs) - 1]


def _start(boundary: str) -> tuple[float, bool]:
    """Returns a boundary and whether it counts updates."""
    if not boundary.endswith("u"):
        return _number(boundary, "start"), False
    digits = boundary[:-1]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 15):
        raise _refusal(f"start {boundary!r} is not a whole number of updates")
    return float(digits), True


def _number(number: str, name: str) -> float:
    try:
        result = float(number)
    except ValueError:
        result = math.nan
    if not (math.isfinite(result) and result >= 0):
        raise _refusal(f"{name} {number!r} is not a finite number of at least 0")
    return result


def _refusal(reason: str) -> ScheduleError:
    return ScheduleError(f"{reason}; {_EXAMPLE}")
