"""One more decoder layer over the states at the exit, then norm and the backbone's unembedding."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import Around, ExitHead, HeadContext

INITS = ("copy", "random")


@register("layer")
class Layer(ExitHead):
    """A whole block of its own with keys and values of its own, norm, tied unembedding (EESD, EE-Tuning).

    init: "copy" starts from the model's last block, "random" from fresh weights with the last block's spread. Papers:
    EESD, arXiv 2406.03853; EE-Tuning, arXiv 2402.00518.
    """

    mixes = True
    lens = False

    def __init__(self, base: HeadContext, init: str) -> None:
        super().__init__()
        if init not in INITS:
            raise BadArgument(f"layer: init={init!r} is not one of {', '.join(INITS)}")
        if base.block is None:
            raise BadArgument("head 'layer' copies a decoder block, and this model has none; use head='translator'")
        self.exit_norm = copy.deepcopy(base.norm)
        # the config stays the model's: it says which attention the block uses
        shared = {id(m.config): m.config for m in base.block.modules() if hasattr(m, "config")}
        self.block = copy.deepcopy(base.block, shared)
        self.share(base)
        if init == "random":
            for weight in self.block.parameters():
                if weight.dim() > 1:
                    nn.init.normal_(weight, std=float(weight.detach().float().std()))

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, init: str = "copy") -> Layer:
        """Start from a copy of the last block."""
        return cls(base, init)

    def mix(self, hidden: Tensor, around: Around) -> Tensor:
        """Run the block on states [batch, new, width]."""
        if around.call is None:
            raise BadArgument("head 'layer' runs a block as the model does, and nothing here can")
        return around.call(self.block, hidden)

    def features(self, hidden: Tensor) -> Tensor:
        """Return the normed state."""
        out: Tensor = self.exit_norm(hidden)
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map mixed states [..., width] to logits [..., classes]."""
        return self.unembed(self.features(hidden))
