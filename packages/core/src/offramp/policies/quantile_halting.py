"""Exit at a quantile of a learned distribution over exits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.kernels.halting import draw
from offramp.policy import UNIT_GRID, Evidence, ExitPolicy, State, at_exit, thresholds

RULES = ("quantile", "sample")


@register("quantile_halting")
@dataclass(frozen=True)
class QuantileHalting(ExitPolicy):
    """Stop a row at the first exit up to which more than `threshold` of its halting distribution lies.

    The gate says lambda, the chance to stop here after not having stopped: exit i has lambda_i prod(1 - lambda before),
    the full model what is left over. threshold: quantile in [0, 1[, one number or one per exit; higher is safer.
    rule="sample" draws instead, with chance lambda at each exit (PonderNet), from `seed` and the row's own lambda
    alone: a batch then decides as its rows do, and a replay as the run did; threshold has no meaning there. Needs exits
    with `gate="lambda"`, trained by `offramp.fit(model, data, loss="ponder")`. The expectation over all exits, which
    saves nothing, is `offramp.halting.expectation(trace)`. Raises `BadArgument`. Papers: PALBERT (arXiv 2204.03276),
    with 0.5; PonderNet (arXiv 2107.05407).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"lambda"})
    safer: ClassVar[str] = "up"
    threshold: float | tuple[float, ...] = 0.5
    rule: str = "quantile"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, 1.0, "quantile_halting"))
        if 1.0 in (self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)):
            raise BadArgument(
                "quantile_halting: threshold 1 is outside [0, 1[; no share is above it. To never exit, write "
                'offramp.enable(model, "never")'
            )
        if self.rule not in RULES:
            raise BadArgument(f"quantile_halting: rule {self.rule!r} is not one of {', '.join(RULES)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise BadArgument(f"quantile_halting: seed must be a whole number from 0 on, not {self.seed!r}")

    def start(self, batch: int, device: torch.device | str) -> State:
        """Return the mass that is left, 1."""
        return {"left": torch.ones(batch, device=device)}

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Take in this exit's lambda; the state of a row with NaN stays NaN, so it never stops."""
        chance = seen["lambda"]
        left = state["left"] * (1 - chance)
        if self.rule == "sample":
            stop = draw(chance, self.seed, seen.index) < chance
        else:
            stop = 1 - left > at_exit(self.threshold, seen.index)
        return stop & left.isfinite(), {"left": left}

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return this policy at every threshold below 1 of the common grid; raises `BadArgument` for draws."""
        if self.rule == "sample":
            raise BadArgument("quantile_halting: rule='sample' has no threshold to calibrate; use rule='quantile'")
        return [dataclasses.replace(self, threshold=t) for t in UNIT_GRID[1:]]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return the median unless another quantile is given."""
        return cls(**options)
