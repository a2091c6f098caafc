"""Own norm, the backbone's own unembedding, started from the backbone's norm or anew: EE-LLM's plainest head."""

from __future__ import annotations

import copy

from torch import Tensor

from offramp._registry import register
from offramp.backbone import Tap
from offramp.head import ExitHead, HeadContext
from offramp.heads._start import check_init, renew


@register("norm")
class Norm(ExitHead):
    """The head `tied` with a choice of start; `width` trainable numbers per exit.

    init: "copy" starts from the final norm, which is the logit lens, "random" as a new model would (gain 1, bias 0),
    slower to train. Raises `BadArgument`. With an unembedding of its own it is the head `linear`. Paper: EE-LLM, "norm"
    (arXiv 2312.04916); EE-Tuning found copies to converge faster (arXiv 2402.00518).
    """

    def __init__(self, base: HeadContext, init: str) -> None:
        super().__init__()
        check_init("norm", init)
        self.exit_norm = copy.deepcopy(base.norm)
        self.share(base)
        if init == "random":
            renew(self.exit_norm, base.width)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, init: str = "copy") -> Norm:
        """Start as the logit lens, or anew."""
        return cls(base, init)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to logits [..., classes]."""
        return self.unembed(self.exit_norm(hidden))
