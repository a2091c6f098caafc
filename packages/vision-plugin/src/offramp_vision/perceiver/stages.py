"""Where the stages of a model end: where the grid of the image changes."""

from __future__ import annotations

from offramp.backbone import Backbone
from offramp.errors import UnsupportedModel
from offramp_vision.layouts import FIRST, LAST

#: the branch has as many at most; what comes before the last four grids belongs to the first stage
STAGES = 4


def ends_of(backbone: Backbone) -> tuple[int, ...]:
    """Return the depth at which each stage ends, the full depth last; raises `UnsupportedModel` for fewer than two."""
    taps = backbone.taps()
    grids = [tap.grid if tap.layout in (FIRST, LAST) else () for tap in taps]
    ends = [tap.depth for tap, after in zip(taps, [*grids[1:], None], strict=True) if tap.grid != after]
    if () in grids or len(ends) < 2:
        raise UnsupportedModel(
            f"{type(backbone.model).__name__} has no stages of smaller and smaller maps (its states are "
            f"{taps[0].layout}, grids {sorted(set(grids), reverse=True)}), so no latent branch goes beside it; give a "
            f"model in stages, e.g. resnet50, convnext_tiny, swin_tiny_patch4_window7_224, or attach other heads"
        )
    return tuple(ends[-STAGES:])
