"""Where in the image the places of a state are: pixels per place, tokens before the image's own, and the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from offramp_vision.layouts import FIRST, TOKENS


def places(
    model: Any, layout: str, shape: Sequence[int], size: Sequence[int]
) -> tuple[int, int, tuple[int, ...]]:
    """Return (reduction, prefix, grid) of a state of this layout and shape, without its batch, of images of `size`.

    The grid is () and the reduction 0 for tokens that form none, e.g. after pooling.
    """
    if layout != TOKENS:
        grid = tuple(shape[1:]) if layout == FIRST else tuple(shape[:2])
        return round(size[0] / grid[0]), 0, grid
    tokens = shape[0]
    declared = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if declared is not None and math.prod(declared) <= tokens:
        grid = tuple(declared)
    else:  # the largest grid of the image's proportions that the tokens fill: the rest is a prefix
        step = next((s for s in range(1, size[0] + 1) if (size[0] // s) * (size[1] // s) <= tokens), 0)
        grid = (size[0] // step, size[1] // step) if step else ()
    prefix = tokens - math.prod(grid) if grid else 0
    if not grid or prefix > 16:  # more than any model has of class tokens and registers: these tokens are no grid
        return 0, 0, ()
    return round(size[0] / grid[0]), prefix, grid
