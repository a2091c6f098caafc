"""The state goes on as it is, and beside it a small module estimates how wrong the answer from here would be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.head import HeadContext
from offramp_diffusers.head import DenoiserHead, denoiser, output_layers

#: numbers that say the noise level, as sines and cosines of rising periods
TIME = 32


@register("uncertainty")
class UncertaintyHead(DenoiserHead):
    """One linear layer on every token's state beside the noise level, through a sigmoid, mean over tokens.

    The model's own output layers answer from the state as it is. output: True for output layers of each exit's own, as
    in the paper, which start as copies of the model's. Untrained, it estimates 1/2. Raises `BadArgument`. Paper:
    DeeDiff (arXiv 2309.17074).
    """

    def __init__(self, width: int, layers: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(layers)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # states grow with depth, and the layer is one layer
        self.estimate = nn.Linear(width + TIME, 1)
        nn.init.zeros_(self.estimate.weight)
        nn.init.zeros_(self.estimate.bias)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, output: bool = False) -> UncertaintyHead:
        """Build the head; raises `BadArgument` on a model whose readout is made of a norm and a classifier."""
        context = denoiser(base, "uncertainty", 'gate="linear" beside another head')
        return cls(tap.width, output_layers(context) if output else None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the state [batch, token, width] as it is."""
        return hidden

    def uncertainty(self, hidden: Tensor, level: Tensor) -> Tensor:
        """Return the estimated error [rows], from 0 to 1, of states [rows, token, width] at noise levels [rows]."""
        periods = torch.logspace(1, 4, TIME // 2, device=hidden.device, dtype=torch.float32)
        angles = level.to(hidden.device, torch.float32)[:, None] / periods
        told = torch.cat([angles.sin(), angles.cos()], -1).to(hidden.dtype)
        tokens = told[:, None].expand(-1, hidden.shape[1], -1)
        both = torch.cat([self.norm(hidden), tokens], -1)
        out: Tensor = self.estimate(both).sigmoid().mean((1, 2))
        return out
