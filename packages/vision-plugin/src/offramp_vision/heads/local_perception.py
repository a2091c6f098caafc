"""LGViT's head for shallow exits: convolutions see what is near, which shallow attention has not yet."""

from __future__ import annotations

from torch import Tensor, nn

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import HeadContext
from offramp_vision.heads._perceive import Perceive


@register("local_perception")
class LocalPerception(Perceive):
    """Pointwise, depthwise 3 x 3 and pointwise convolutions with GELU and batch norm, added to the patch tokens.

    form: "a" as said, for the first exits, or "b" without the depthwise one; dropout: in training. About
    2 * places * width^2 multiply-adds per image. Started at random. Raises `BadArgument`. Paper: LGViT (Xu et al., ACM
    MM 2023, arXiv 2308.00255).
    """

    modal = True

    def __init__(self, tap: Tap, classes: int, form: str, dropout: float) -> None:
        super().__init__("local_perception", tap, classes)
        if form not in ("a", "b"):
            raise BadArgument(f'local_perception: form {form!r} is neither "a" nor "b" (without depthwise convolution)')
        if not 0 <= dropout < 1:
            raise BadArgument(f"local_perception: dropout {dropout!r} must be a share from 0 to below 1")
        width = tap.width
        near = [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.GELU(), nn.BatchNorm2d(width)]
        self.look = nn.Sequential(
            *(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width), nn.Dropout(dropout)),
            *(near if form == "a" else []),
            *(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)),
        )
        self.drop = nn.Dropout(dropout)

    @classmethod
    def build(cls, tap: Tap, base: HeadContext, form: str = "a", dropout: float = 0.0) -> LocalPerception:
        """Start at random."""
        return cls(tap, base.classes, form, dropout)

    def perceive(self, hidden: Tensor) -> Tensor:
        """Return patch tokens [batch, token, width] that have seen their neighbours."""
        image = self.image(hidden)
        out: Tensor = self.drop((image + self.look(image)).flatten(2).transpose(1, 2))
        return out
