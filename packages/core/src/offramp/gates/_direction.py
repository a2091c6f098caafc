"""What `linear` and `learned_to_exit` share: a direction in the space of states, and a bias."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offramp.gate import NOTHING, ExitGate, normed


class Direction(ExitGate):
    """One direction and one bias, for all exits or for each of them; untrained it says 0.5.

    The state is normalised first, without numbers of its own, so that exits whose states differ in scale can share the
    direction.
    """

    def __init__(self, width: int, count: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))
        self.bias = nn.Parameter(torch.zeros(count))

    def log_odds(
        self,
        hidden: Tensor,
        index: int = 0,
        previous: Tensor | None = None,
        stats: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        """Map hidden [..., width] to log-odds [...] in float32."""
        row = index if len(self.weight) > 1 else 0
        return normed(hidden) @ self.weight[row].float() + self.bias[row].float()
