"""The backbone's own final norm and unembedding, with nothing of the exit's own: what LayerSkip decodes with."""

from __future__ import annotations

from torch import Tensor

from offramp._registry import register
from offramp.backbone import Tap
from offramp.head import ExitHead, HeadContext


@register("shared")
class Shared(ExitHead):
    """The logit lens itself; no numbers of its own, so only training the backbone changes it (arXiv 2404.16710)."""

    own = False

    def __init__(self, base: HeadContext) -> None:
        super().__init__()
        self.share(base)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> Shared:
        """Take the backbone's readout."""
        return cls(base)

    def features(self, hidden: Tensor) -> Tensor:
        """Return the state after the backbone's norm."""
        base: HeadContext = self.__dict__["base"]
        out: Tensor = base.norm(hidden)
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to logits [..., classes]."""
        return self.unembed(self.features(hidden))
