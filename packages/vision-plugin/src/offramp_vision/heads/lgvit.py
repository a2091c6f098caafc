"""LGViT's placement: which of its heads goes to which exit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from offramp._registry import register
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.head import ExitHead, HeadContext
from offramp_vision.heads._perceive import Perceive
from offramp_vision.heads.global_aggregation import GlobalAggregation
from offramp_vision.heads.local_perception import LocalPerception

#: heads by number of exits, shallow first: a, b are forms of local perception, 2, 3 strides of global aggregation
TABLE = {2: "a2", 4: "ab23", 6: "ab2233", 8: "aabb2233"}


@register("lgvit")
class Lgvit(ExitHead):
    """Local perception at the shallow exits, global aggregation at the deep ones.

    Takes 2, 4, 6 or 8 exits (of 6, two are local); heads, dropout: of the attention and the convolutions. Started at
    random.
    Raises `BadArgument`. Paper: LGViT (Xu et al., ACM MM 2023, arXiv 2308.00255).
    """

    whole = True
    lens = False
    modal = True

    def __init__(self, inner: Perceive) -> None:
        super().__init__()
        self.inner = inner

    @classmethod
    def build(
        cls, tap: Tap, base: HeadContext, at: Sequence[int] = (), heads: int = 8, dropout: float = 0.0
    ) -> Lgvit:
        """Build the head that the table has for this exit. at: depths of all exits."""
        if len(at) not in TABLE:
            raise BadArgument(
                f"lgvit: there is no placement for {len(at)} exits, only for {', '.join(map(str, TABLE))}; give "
                f"so many taps, or choose one kind for all: head='local_perception' or head='global_aggregation'"
            )
        kind = TABLE[len(at)][list(at).index(tap.depth)]
        if kind in "ab":
            return cls(LocalPerception.build(tap, base, kind, dropout))
        return cls(GlobalAggregation.build(tap, base, int(kind), heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map states [batch, ...] to logits [batch, classes]."""
        out: Tensor = self.inner(hidden)
        return out
