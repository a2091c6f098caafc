"""The exit of a U-Net: bring a small state to the size and the channels that are read where it goes on."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import HeadContext
from offramp_diffusers.head import DenoiserHead, denoiser


@register("upsample")
class Upsample(DenoiserHead):
    """Nearest upsampling, then a 1 x 1 convolution to the channels that are read next.

    On the way up that is the output layers, at the full size. On the way down it is the up block of the same level: the
    state goes straight across, and everything below does not run. It has to be trained
    (`offramp_diffusers.tune_heads.tune_heads`); where channels are equal it starts as upsampling. Raises `BadArgument`.
    """

    lens = False
    any_width = True
    image = True
    needed = True

    def __init__(self, width: int, out: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.map = nn.Conv2d(width, out, 1)
        nn.init.dirac_(self.map.weight)
        if self.map.bias is not None:
            nn.init.zeros_(self.map.bias)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> Upsample:
        """Build the head; raises `BadArgument` for a tap that is neither a down nor an up block's."""
        targets = denoiser(base, "upsample", 'head="pooled_linear"').targets
        if tap.depth not in targets:
            raise BadArgument(
                f"head 'upsample' stands after a down or an up block of a U-Net, and depth {tap.depth} is {tap.name}; "
                f"places: {list(targets) or 'none here, use head=' + repr('passthrough')}"
            )
        return cls(tap.width, *targets[tap.depth])

    def forward(self, hidden: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map hidden [batch, channels, height, width] to [batch, out, *size]; size: None for `factor` times as large.
        """
        wanted = (hidden.shape[2] * self.factor, hidden.shape[3] * self.factor) if size is None else size
        if hidden.shape[2:] != wanted:
            hidden = functional.interpolate(hidden, size=wanted, mode="nearest")
        out: Tensor = self.map(hidden)
        return out
