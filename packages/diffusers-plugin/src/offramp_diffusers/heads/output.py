"""Output layers of the exit's own: a full answer from every depth that has one."""

from __future__ import annotations

from torch import Tensor

from offramp._registry import register
from offramp.backbone import Tap
from offramp.head import HeadContext
from offramp_diffusers.head import DenoiserHead, denoiser, output_layers


@register("output")
class Output(DenoiserHead):
    """Copies of the model's output layers that are trained for the states of this exit; untrained, they say the same.

    The model runs them in place of its own for the rows that leave here, and makes the image of what they say as ever.
    What they hold depends on the model: its last norm with the map of the noise level, and its projection. Train them
    with `offramp_diffusers.tune_heads.tune_heads`. Raises `BadArgument`. Paper: DeeDiff (arXiv 2309.17074); its layers
    have the form of its model's own too.
    """

    any_width = True
    needed = True

    @classmethod
    def build(cls, tap: Tap, base: HeadContext) -> Output:
        """Copy the output layers."""
        return cls(output_layers(denoiser(base, "output", 'head="linear"')))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the state [batch, token, width] as it is: the exit's own layers read it."""
        return hidden
