"""No weights: the state goes on as it is, and the model's own output layers read it."""

from __future__ import annotations

from torch import Tensor

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import HeadContext
from offramp_diffusers.head import DenoiserHead, denoiser


@register("passthrough")
class Passthrough(DenoiserHead):
    """The exit of a denoiser: skipped blocks pass the state on to the model's own output layers (DuoDiff, ASE).

    Its prediction is the state itself [batch, token, width], so there are no class probabilities to look at, to record
    or to train. Raises `BadArgument` on a model whose readout is made of a norm and a classifier.
    """

    any_width = True

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> Passthrough:
        """Build the head; there is nothing to start from."""
        denoiser(base, "passthrough", 'head="tied"')
        return cls()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the state [batch, token, width] as it is; raises `BadArgument` for single rows of it."""
        if hidden.dim() < 3:
            raise BadArgument(
                "a denoiser's exit says nothing about a row of its state, so there is nothing to record or to fit with "
                'head "passthrough"; choose the depth by the images it makes: offramp.enable(model, "fixed", depth=...)'
            )
        return hidden
