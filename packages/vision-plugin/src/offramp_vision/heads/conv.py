"""Norm, pointwise convolution, pooling, linear layer: an exit of convnets that mixes channels before it pools."""

from __future__ import annotations

from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import ExitHead, HeadContext
from offramp_vision.layouts import check_grid, map_of


@register("conv")
class Conv(ExitHead):
    """Batch norm, pointwise convolution, ReLU, mean over places, linear layer; started at random.

    inner: channels between, 0 for as many as the state has; 2 * places * width * inner operations per image, which at
    the first stages is more than all the rest of the head. Raises `BadArgument`. Paper: MSDNet's classifiers (Huang et
    al., ICLR 2018), here with pointwise convolutions.
    """

    whole = True
    lens = False
    modal = True

    def __init__(self, tap: Tap, classes: int, inner: int) -> None:
        super().__init__()
        if isinstance(inner, bool) or not isinstance(inner, int) or inner < 0:
            raise BadArgument(f"conv: inner must be a number of channels (0: as many as the state), not {inner!r}")
        check_grid("conv", tap)
        self.place = (tap.layout, tap.prefix, tap.grid)
        inner = inner or tap.width
        self.exit_norm = nn.BatchNorm2d(tap.width)
        self.mix_channels = nn.Conv2d(tap.width, inner, 1)
        self.proj = nn.Linear(inner, classes)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, inner: int = 0) -> Conv:
        """Start at random."""
        return cls(tap, base.classes, inner)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map states [batch, ...] to logits [batch, classes]."""
        seen = self.mix_channels(self.exit_norm(map_of(*self.place, hidden))).relu()
        out: Tensor = self.proj(seen.mean((2, 3)))
        return out
