"""An MLP of the exit's own before norm and tied unembedding: EE-LLM's head between a norm and a whole layer."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import ExitHead, HeadContext
from offramp.heads._start import check_init


@register("mlp")
class MLP(ExitHead):
    """Adds what an MLP makes of the normed state, as a block does, then reads the sum with the backbone's unembedding.

    ratio: inner width in widths of the state; 2 * ratio * width^2 trainable numbers per exit and as many multiply-adds
    per token. init: "copy" starts the way back into the state at zero, so that the untrained head is the logit lens;
    "random" starts it as any layer. Raises `BadArgument`. Paper: EE-LLM (arXiv 2312.04916), EE-Tuning (arXiv
    2402.00518), where the MLP branches off the last block's attention; here it follows the whole block.
    """

    def __init__(self, base: HeadContext, ratio: float, init: str) -> None:
        super().__init__()
        check_init("mlp", init)
        inner = round(ratio * base.width)
        if inner < 1:
            raise BadArgument(f"mlp: ratio {ratio} of width {base.width} leaves no inner units; give ratio=4")
        self.mlp_norm = nn.RMSNorm(base.width)
        self.inward = nn.Linear(base.width, inner, bias=False)
        self.outward = nn.Linear(inner, base.width, bias=False)
        self.exit_norm = copy.deepcopy(base.norm)
        self.share(base)
        if init == "copy":
            nn.init.zeros_(self.outward.weight)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, ratio: float = 4.0, init: str = "copy") -> MLP:
        """Start as the logit lens, or with a random MLP."""
        return cls(base, ratio, init)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to logits [..., classes]."""
        moved = hidden + self.outward(nn.functional.silu(self.inward(self.mlp_norm(hidden))))
        return self.unembed(self.exit_norm(moved))
