"""The gate: a small trained module that says from the state at an exit whether the exit will agree with the full model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import UnknownName, did_you_mean


class LinearGate(nn.Module):
    """One direction and one bias for all exits: width + 1 numbers; untrained it says 0.5.

    Paper: the classifier of CALM (arXiv 2207.07061). The state is normalised first, without numbers of its own, so that
    exits whose states differ in scale can share the direction.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def log_odds(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to log-odds [...] in float32."""
        state = functional.layer_norm(hidden.float(), hidden.shape[-1:])
        return functional.linear(state, self.weight.float(), self.bias.float()).squeeze(-1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to the probability [...] that the exit agrees, in float32."""
        return self.log_odds(hidden).sigmoid()


GATES = {"linear": LinearGate}


def build_gate(name: str, width: int) -> LinearGate:
    """Return a fresh gate for states of this width; raises `UnknownName`."""
    if name not in GATES:
        raise UnknownName(f"no gate is called {name!r};{did_you_mean(name, GATES)}")
    return GATES[name](width)
