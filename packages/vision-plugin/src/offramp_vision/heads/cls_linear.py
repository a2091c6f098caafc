"""The class token, a norm, one linear layer: the exit that early-exit transformers began with."""

from __future__ import annotations

from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import ExitHead, HeadContext


@register("cls_linear")
class ClsLinear(ExitHead):
    """Norm and linear layer on the first token; `width * classes` trainable numbers per exit, started at random.

    Raises `BadArgument` at taps without prefix tokens. Paper: ViT-EE (Bakhtiarnia et al., BMVC 2021).
    """

    whole = True
    lens = False

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.exit_norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, classes)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> ClsLinear:
        """Start at random."""
        if not tap.prefix:
            raise BadArgument(f"cls_linear: there is no class token after {tap.name}; use head='pooled_linear'")
        return cls(tap.width, base.classes)

    def reduce(self, hidden: Tensor) -> Tensor:
        """Return the class token: [batch, token, width] -> [batch, width]."""
        return hidden[:, 0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map class tokens [batch, width] to logits [batch, classes]."""
        out: Tensor = self.proj(self.exit_norm(hidden))
        return out
