"""Ask for more certainty early in a text than late in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

from offramp._registry import create, register
from offramp.errors import BadArgument
from offramp.policies._wrapping import wrapped
from offramp.policy import Evidence, ExitPolicy, State, ThresholdPolicy, at_exit


@register("decaying")
@dataclass(frozen=True)
class Decaying(ExitPolicy):
    """Wrap a threshold policy so that its threshold t becomes clip(0.9 t + 0.1 exp(-tau position / length), 0, 1).

    inner: a policy whose higher threshold is safer (confidence, margin, saturation), its config, or its name together
    with `threshold`; length: positions over which it decays, >= 1, usually the longest output; tau: >= 0, higher decays
    sooner, so is faster late in the text. Needs `position`. Raises `BadArgument`. Paper: CALM (Schuster et al., arXiv
    2207.07061), section 3.2; the authors' code multiplies the second term by t as well, which is not done here.
    """

    inner: ExitPolicy
    length: int
    tau: float = 4.0
    threshold: InitVar[Any] = None

    def __post_init__(self, threshold: Any) -> None:
        if isinstance(self.inner, str):
            options = {} if threshold is None else {"threshold": threshold}
            object.__setattr__(self, "inner", create(ExitPolicy, self.inner, **options))
        elif threshold is not None:
            raise BadArgument(f"decaying: give threshold={threshold!r} to the inner policy, or give inner as a name")
        object.__setattr__(self, "inner", wrapped(self.inner, "decaying"))
        if not isinstance(self.inner, ThresholdPolicy) or type(self.inner).safer != "up":
            raise BadArgument(
                f"decaying: {type(self.inner).__name__} has no threshold in [0, 1] whose higher values are safer; "
                f"wrap confidence, margin or saturation"
            )
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise BadArgument(f"decaying: length must be a whole number of positions, at least 1, not {self.length!r}")
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 <= self.tau < float("inf"):
            raise BadArgument(f"decaying: tau must be a number >= 0, not {self.tau!r}")

    def statistics(self) -> frozenset[str]:
        """Return what the wrapped policy needs."""
        return self.inner.statistics()

    def start(self, batch: int, device: torch.device | str) -> State:
        """Return the wrapped policy's state."""
        return self.inner.start(batch, device)

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the rows that pass the wrapped policy's threshold as it stands at their position."""
        if seen.position is None:
            raise BadArgument(
                "decaying needs the position of every row (tokens already generated), and this call has none; "
                f"use the wrapped policy by itself: {self.inner.config()}"
            )
        inner: Any = self.inner
        late = torch.exp(seen.position.float() * (-self.tau / self.length))
        return inner.stops(seen, (0.9 * at_exit(inner.threshold, seen.index) + 0.1 * late).clamp(0.0, 1.0)), state

    def check(self, depths: Sequence[int]) -> None:
        """Check the wrapped policy."""
        self.inner.check(depths)

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return the wrapped policy's ladder, each rung decaying alike."""
        return [dataclasses.replace(self, inner=rung) for rung in self.inner.ladder(depths, classes)]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return confidence 0.5 decaying over 16 positions unless told otherwise."""
        given = {"inner": "confidence", "length": 16, **options}
        if isinstance(given["inner"], str):
            given.setdefault("threshold", 0.5)
        return cls(**given)
