"""Own norm and own projection, both started from the backbone's: the classic internal classifier."""

from __future__ import annotations

import copy

from torch import Tensor

from offramp._registry import register
from offramp.backbone import Tap
from offramp.head import ExitHead, HeadContext, Rows


@register("linear")
class Linear(ExitHead):
    """Norm and projection of its own; `width * classes` trainable numbers per exit (DeeBERT, BranchyLLM)."""

    def __init__(self, base: HeadContext) -> None:
        super().__init__()
        self.exit_norm = copy.deepcopy(base.norm)
        self.proj = copy.deepcopy(base.projection)
        self.finish = base.finish

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> Linear:
        """Start from copies of the final norm and projection, so that the untrained head is the logit lens."""
        return cls(base)

    def narrowed(self, ids: Tensor) -> ExitHead:
        """Return the head with some rows of its own projection."""
        return self.sharing(proj=Rows(self.proj, ids))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to logits [..., classes]."""
        return self.finish(self.proj(self.exit_norm(hidden)))
