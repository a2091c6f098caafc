"""A small trained map of the state before the model's own output layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import HeadContext
from offramp_diffusers.head import DenoiserHead, denoiser


@register("bottleneck")
class Bottleneck(DenoiserHead):
    """The state plus a two-layer map of it through `r` numbers, which starts as nothing, then the output layers.

    r: width in between, at least 1; 2 * r * width trainable numbers per exit and their biases.
    """

    needed = True

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.down = nn.Linear(width, r)
        self.up = nn.Linear(r, width)
        nn.init.zeros_(self.up.weight)  # untrained, the state goes on as it is
        nn.init.zeros_(self.up.bias)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, r: int = 32) -> Bottleneck:
        """Build the head; raises `BadArgument` on a model whose readout is made of a norm and a classifier."""
        denoiser(base, "bottleneck", 'head="mlp"')
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise BadArgument(f"bottleneck: r must be a whole number, at least 1, not {r!r}")
        return cls(tap.width, r)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the mapped state [batch, token, width]."""
        out: Tensor = hidden + self.up(torch.nn.functional.gelu(self.down(self.norm(hidden))))
        return out
