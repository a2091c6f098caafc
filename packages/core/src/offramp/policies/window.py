"""Go on only near the point where answers are accepted or rejected: far from it, more computing changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp._registry import create, register
from offramp.errors import BadArgument
from offramp.policies._wrapping import wrapped
from offramp.policy import Evidence, ExitPolicy, State, ThresholdPolicy, at_exit

#: by what a calibration scales the window, safest first: 64 times as wide to an eighth in steps of 19 %, then nothing
SCALES = (*(2 ** (j / 4) for j in range(24, -13, -1)), 0.0)


@register("window")
@dataclass(frozen=True)
class Window(ExitPolicy):
    """Stop a row when its score lies outside [low, high], whether below or above; rows inside go on.

    inner: the policy whose score is read (its threshold is not used), its config, or its name; low, high: in the unit
    of that score, one number or one per exit. For selective tasks, where the least certain rows are rejected anyway:
    accept or reject by the score of whatever answered. Raises `BadArgument`. Paper: Window-Based Early-Exit Cascades
    for Uncertainty Estimation (Xia & Bouganis, ICCV 2023).
    """

    inner: ExitPolicy
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    def __post_init__(self) -> None:
        made = create(ExitPolicy, self.inner, threshold=0.5) if isinstance(self.inner, str) else self.inner
        object.__setattr__(self, "inner", wrapped(made, "window"))
        if not isinstance(self.inner, ThresholdPolicy) or type(self.inner).step is not ThresholdPolicy.step:
            raise BadArgument(
                f"window: {type(self.inner).__name__} has no score of a single exit to read; use confidence, margin or "
                f"entropy"
            )
        for name in ("low", "high"):
            object.__setattr__(self, name, _bounds(getattr(self, name), name))
        pairs = [(at_exit(self.low, i), at_exit(self.high, i)) for i in range(self._exits() or 1)]
        if odd := [pair for pair in pairs if pair[0] > pair[1]]:
            raise BadArgument(f"window: low={odd[0][0]} is above high={odd[0][1]}, so every row would stop; swap them")

    def _exits(self) -> int | None:
        """Return for how many exits there are bounds, None where one pair holds for all; raises when they differ."""
        found = {len(v) for v in (self.low, self.high) if isinstance(v, tuple)}
        if len(found) > 1:
            raise BadArgument(f"window: low and high hold {sorted(found)} numbers; give one, or one per exit, for each")
        return found.pop() if found else None

    def statistics(self) -> frozenset[str]:
        """Return what the score needs."""
        return self.inner.statistics()

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the rows outside the window; NaN never stops."""
        score = self.inner.score(seen)  # type: ignore[attr-defined]
        return (score < at_exit(self.low, seen.index)) | (score > at_exit(self.high, seen.index)), state

    def check(self, depths: Sequence[int]) -> None:
        """Check the wrapped policy, and that there is one window per exit."""
        self.inner.check(depths)
        if self._exits() not in (None, len(depths)):
            raise BadArgument(
                f"window was given {self._exits()} bounds for {len(depths)} exits (at {list(depths)}); give one "
                f"number, or one per exit"
            )

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return this window from 64 times as wide, where no row stops, down to nothing, each around its own middle."""
        if all(at_exit(self.low, i) == at_exit(self.high, i) for i in range(self._exits() or 1)):
            raise BadArgument("window: low equals high, and nothing times any scale is nothing; give it a width")
        return [self._scaled(scale) for scale in SCALES]

    def _scaled(self, scale: float) -> Window:
        several = isinstance(self.low, tuple) or isinstance(self.high, tuple)
        low, high = [], []
        for i in range(self._exits() or 1):
            a, b = at_exit(self.low, i), at_exit(self.high, i)
            middle, half = (a + b) / 2, (b - a) / 2 * scale
            low.append(middle - half)
            high.append(middle + half)
        return dataclasses.replace(
            self, low=tuple(low) if several else low[0], high=tuple(high) if several else high[0]
        )

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return a window on confidence from 0.3 to 0.8 unless told otherwise."""
        return cls(**{"inner": create(ExitPolicy, "confidence", threshold=0.5), "low": 0.3, "high": 0.8, **options})


def _bounds(value: Any, name: str) -> float | tuple[float, ...]:
    several = isinstance(value, (list, tuple))
    values = tuple(value) if several else (value,)
    if not values or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise BadArgument(f"window: {name} must be a number, or one per exit, not {value!r}")
    if not torch.tensor(values, dtype=torch.float64).isfinite().all():
        raise BadArgument(f"window: {name}={value!r} is not finite; to never exit, use the policy never")
    return tuple(float(v) for v in values) if several else float(values[0])
