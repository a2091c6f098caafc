"""The exit of a U-Net: bring a small state to the size and the channels that the output layers read."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn import functional

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import ExitHead, HeadContext


@register("upsample")
class Upsample(ExitHead):
    """Nearest upsampling to the full size, then a 1 x 1 convolution to the channels of the output layers.

    It has to be trained (`offramp_diffusers.tune_heads.tune_heads`); where channels are equal it starts as upsampling.
    """

    lens = False
    any_width = True

    def __init__(self, width: int, out: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.map = nn.Conv2d(width, out, 1)
        nn.init.dirac_(self.map.weight)
        if self.map.bias is not None:
            nn.init.zeros_(self.map.bias)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> Upsample:
        """Build the head; raises `BadArgument` for a tap that is no up block's."""
        found = re.fullmatch(r"batch channel height/(\d+) width/\d+", tap.layout)
        if found is None:
            raise BadArgument(
                f"head 'upsample' stands after an up block of a U-Net, and depth {tap.depth} is {tap.name}; choose a "
                f"depth on the way up, or head=\"passthrough\" for a diffusion transformer"
            )
        return cls(tap.width, base.width, int(found[1]))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [batch, channels, height / factor, width / factor] to [batch, out, height, width]."""
        if self.factor > 1:
            hidden = functional.interpolate(hidden, scale_factor=self.factor, mode="nearest")
        out: Tensor = self.map(hidden)
        return out
