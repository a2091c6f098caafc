"""Own copy of the final norm, the backbone's own unembedding: the logit lens with a norm that can be trained."""

from __future__ import annotations

import copy

from torch import Tensor

from offramp._registry import register
from offramp.backbone import Tap
from offramp.head import ExitHead, HeadContext


@register("tied")
class Tied(ExitHead):
    """Norm of its own, projection of the backbone; `width` trainable numbers per exit (LayerSkip, CALM)."""

    def __init__(self, base: HeadContext) -> None:
        super().__init__()
        self.exit_norm = copy.deepcopy(base.norm)
        self.share(base)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> Tied:
        """Start from the final norm itself, so that the untrained head is the logit lens."""
        return cls(base)

    def features(self, hidden: Tensor) -> Tensor:
        """Return the normed state."""
        out: Tensor = self.exit_norm(hidden)
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to logits [..., classes]."""
        return self.unembed(self.features(hidden))
