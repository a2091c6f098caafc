"""Dynamic Perceiver: the exit reads latents that go along beside the model, not the model's own features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.head import ExitHead, HeadContext

if TYPE_CHECKING:
    from offramp.attach import Exits


@register("perceiver")
class Perceiver(ExitHead):
    """Norm and linear layer on the mean latent and, from the second exit on, on what the exit before says.

    `offramp_vision.perceiver.attach` attaches it. latents: how many in the first stage, divisible by 2 per further
    stage; depths: transformer blocks per stage; places: side of the grid that a map is pooled to when latents look at
    it. Raises `BadArgument`, `UnsupportedModel`. Paper: Dynamic Perceiver (Han et al., ICCV 2023, arXiv 2306.11248),
    with layer norms where it has batch norms, so that images do not see one another.
    """

    whole = True
    lens = False
    live: ClassVar[bool] = True

    def __init__(self, width: int, classes: int, told: bool) -> None:
        super().__init__()
        self.width = width
        self.exit_norm = nn.LayerNorm(width)
        self.hear = nn.Sequential(nn.Linear(classes, width), nn.LayerNorm(width), nn.ReLU()) if told else None
        self.proj = nn.Linear(2 * width if told else width, classes)

    @classmethod
    def build(
        cls,
        tap: Tap,
        base: HeadContext,
        at: Sequence[int] = (),
        latents: int = 128,
        depths: Sequence[int] = (3, 3, 9, 3),
        places: int = 7,
    ) -> Perceiver:
        """Start at random. at: depths of all exits."""
        return cls(tap.width, base.classes, list(at).index(tap.depth) > 0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map mean latents [rows, width], beside the logits of the exit before [rows, width + classes], to logits."""
        seen = self.exit_norm(hidden[..., : self.width])
        if self.hear is not None:
            seen = torch.cat([seen, self.hear(hidden[..., self.width :])], -1)
        out: Tensor = self.proj(seen)
        return out

    @classmethod
    def attached(cls, exits: Exits) -> Callable[[], None]:
        """Put the latent branch beside the model; returns the undo."""
        from offramp_vision.perceiver.backbone import beside  # timm's own blocks are in it

        return beside(exits)
