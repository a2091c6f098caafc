"""A gate that reads the state and the one before, and says how likely it is to stop here after not having stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offramp._registry import register
from offramp.gate import NOTHING, ExitGate, normed, whole

#: log-odds of 0.1, the prior that PALBERT trains towards
START = -2.1972


@register("lambda")
class Lambda(ExitGate):
    """Three layers Linear + tanh and one Linear to a number over [state; state at the exit before], for all exits.

    hidden: width of the three layers. At the first exit the state before is zero; states are normalised first. Its
    statistic "lambda" is P(stop here | not stopped before), untrained 0.1; trained by `fit(loss="ponder")`, read by the
    policy "quantile_halting". Raises `BadArgument`. Paper: PALBERT (Balagansky and Gavrilov, arXiv 2204.03276).
    """

    statistic: ClassVar[str] = "lambda"
    loss: ClassVar[str] = "ponder"
    looks_back: ClassVar[bool] = True
    zero: ClassVar[str] = "out.weight"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        sizes = (2 * width, hidden, hidden, hidden)
        layers = [m for a, b in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(a, b), nn.Tanh())]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, START)

    @classmethod
    def build(cls, width: int, exits: int, hidden: int = 64) -> Lambda:
        """Start at 0.1 for every state."""
        return cls(width, whole("hidden", hidden, "lambda"))

    def log_odds(
        self,
        hidden: Tensor,
        index: int = 0,
        previous: Tensor | None = None,
        stats: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        """Map hidden and previous [..., width] to log-odds [...] in float32."""
        now = normed(hidden)
        before = torch.zeros_like(now) if previous is None else normed(previous)
        weight: Any = self.out.weight
        seen = torch.cat([now, before], -1).to(weight.dtype)
        out: Tensor = self.out(self.body(seen)).squeeze(-1)
        return out.float()
