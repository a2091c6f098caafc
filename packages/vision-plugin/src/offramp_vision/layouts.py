"""Layouts of a state: which axis is the width, which are places of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from offramp.backbone import Tap
from offramp.errors import BadArgument

TOKENS, FIRST, LAST = "batch token width", "batch channel height width", "batch height width channel"


def width_of(layout: str, shape: Sequence[int]) -> int:
    """Return the width of a state [...] without its batch."""
    return shape[0] if layout == FIRST else shape[-1]


def layout_of(shapes: Sequence[Sequence[int]]) -> str | None:
    """Return the layout that states of these shapes, without batch, have in common; None where there is none.

    Maps keep their width last or first: places shrink on the way and widths grow, so the axis that grows is the width;
    where nothing changes, the two axes of equal length are places.
    """
    if {len(s) for s in shapes} == {2}:
        return TOKENS
    if {len(s) for s in shapes} != {3}:
        return None
    one, two = shapes[0], shapes[-1]
    if two[0] > one[0]:
        return FIRST
    if two[2] > one[2]:
        return LAST
    return FIRST if two[1] == two[2] else LAST


def mean_of(layout: str, prefix: int, hidden: Tensor) -> Tensor:
    """Return the mean over the places of the image: [batch, ...] -> [batch, width]."""
    if layout == TOKENS:
        return hidden[:, prefix:].mean(1)
    return hidden.mean((2, 3) if layout == FIRST else (1, 2))


def map_of(layout: str, prefix: int, grid: Sequence[int], hidden: Tensor) -> Tensor:
    """Return the state as a map [batch, width, height, width of the grid], without prefix tokens.

    Raises `BadArgument` where the tokens are not those of the grid: images of another resolution.
    """
    if layout == FIRST:
        return hidden
    if layout == LAST:
        return hidden.permute(0, 3, 1, 2)
    if hidden.shape[1] - prefix != math.prod(grid):
        raise BadArgument(
            f"this head was built for {' x '.join(map(str, grid))} places, and these images have "
            f"{hidden.shape[1] - prefix}: give images of the resolution that the exits were trained at, or attach and "
            f"fit new ones to a model built for this one (img_size=...)"
        )
    places = hidden[:, prefix:].transpose(1, 2)
    return places.reshape(*places.shape[:2], *grid)


def check_grid(head: str, tap: Tap) -> None:
    """Raise `BadArgument` where the places of the image form no grid."""
    if not tap.grid:
        raise BadArgument(
            f"{head}: the {tap.layout} state after {tap.name} has no grid of places to look around in; use "
            f"head='pooled_linear'"
        )
