"""LGViT's head for deep exits: attention among a part of the patches gathers what is spread over the image."""

from __future__ import annotations

from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import HeadContext
from offramp_vision.heads._perceive import Perceive


@register("global_aggregation")
class GlobalAggregation(Perceive):
    """Self-attention among every `stride`-th patch of both directions, without residual, norm or MLP.

    stride: 2, or 3 for the deepest exits; heads: of the attention, must divide the width. About
    4 * places / stride^2 * width^2 multiply-adds per image. Started at random. Raises `BadArgument`. Paper: LGViT (Xu
    et al., ACM MM 2023, arXiv 2308.00255).
    """

    def __init__(self, tap: Tap, classes: int, stride: int, heads: int) -> None:
        super().__init__("global_aggregation", tap, classes)
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= min(tap.grid):
            raise BadArgument(
                f"global_aggregation: stride {stride!r} must be a whole number from 1 to {min(tap.grid)}, the smaller "
                f"side of the grid {list(tap.grid)} after {tap.name}"
            )
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise BadArgument(f"global_aggregation: heads {heads!r} must be a whole number from 1 on")
        if tap.width % heads:
            raise BadArgument(f"global_aggregation: {heads} heads do not divide a width of {tap.width}; give heads=...")
        self.stride, self.heads = stride, heads
        self.qkv = nn.Linear(tap.width, 3 * tap.width, bias=False)
        self.out = nn.Linear(tap.width, tap.width)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, stride: int = 2, heads: int = 8) -> GlobalAggregation:
        """Start at random."""
        return cls(tap, base.classes, stride, heads)

    def perceive(self, hidden: Tensor) -> Tensor:
        """Return the chosen patch tokens [batch, token, width] after attention among them."""
        tokens = self.image(hidden)[:, :, :: self.stride, :: self.stride].flatten(2).transpose(1, 2)
        batch, count, width = tokens.shape
        q, k, v = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(seen.transpose(1, 2).reshape(batch, count, width))
        return out
