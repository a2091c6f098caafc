"""A low-rank residual map in hidden space before norm and tied unembedding (tuned lens, arXiv 2303.08112, low rank)."""

from __future__ import annotations

from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import HeadContext
from offramp.heads.tied import Tied


@register("translator")
class Translator(Tied):
    """Moves the state towards what it will become, then reads it with the backbone's unembedding.

    rank: of the residual map; 2 * width * rank trainable numbers and as many multiply-adds per token.
    """

    def __init__(self, base: HeadContext, rank: int) -> None:
        super().__init__(base)
        if rank < 1:
            raise BadArgument(f"translator: rank {rank} is not positive; give rank=64")
        self.down = nn.Linear(base.width, rank, bias=False)
        self.up = nn.Linear(rank, base.width, bias=False)
        nn.init.zeros_(self.up.weight)  # the map starts as the identity: untrained, this is the logit lens

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, rank: int = 64) -> Translator:
        """Start as the logit lens."""
        return cls(base, rank)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to logits [..., classes]."""
        return super().forward(hidden + self.up(self.down(hidden)))
