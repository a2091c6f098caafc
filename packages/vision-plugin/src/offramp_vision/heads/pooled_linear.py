"""Mean over the image, a norm, one linear layer: the plain exit for states of any width and layout."""

from __future__ import annotations

from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.head import ExitHead, HeadContext
from offramp_vision.layouts import mean_of


@register("pooled_linear")
class PooledLinear(ExitHead):
    """Norm and linear layer on the mean over the places of the image; `width * classes` trainable numbers per exit.

    Prefix tokens are left out of the mean. Starts at random: states of early stages fit no other readout. Paper:
    BranchyNet (Teerapittayanon et al., ICPR 2016).
    """

    whole = True
    lens = False

    def __init__(self, tap: Tap, classes: int) -> None:
        super().__init__()
        self.layout, self.prefix = tap.layout, tap.prefix
        self.exit_norm = nn.LayerNorm(tap.width)
        self.proj = nn.Linear(tap.width, classes)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> PooledLinear:
        """Start at random."""
        return cls(tap, base.classes)

    def reduce(self, hidden: Tensor) -> Tensor:
        """Return the mean over places: [batch, ...] -> [batch, width]."""
        return mean_of(self.layout, self.prefix, hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map means [batch, width] to logits [batch, classes]."""
        out: Tensor = self.proj(self.exit_norm(hidden))
        return out
