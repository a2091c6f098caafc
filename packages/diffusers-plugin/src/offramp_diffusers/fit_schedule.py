"""Choose the depth of every bin of noise levels for a budget of blocks, exactly, from measured errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from offramp.errors import BadArgument
from offramp.policy import FULL
from offramp_diffusers.policies.time_schedule import TimeSchedule

#: an error is taken for at least so much of the largest
SMALL = 1e-6


def visits(levels: Sequence[float], bins: int) -> list[int]:
    """Return how many of a solver's steps, at these noise levels, fall into each of `bins` equal bins.

    Raises `BadArgument` for levels outside 0 to 1000 and where there are none.
    """
    if bins < 1 or not len(levels) or any(not 0 <= level <= FULL for level in levels):
        raise BadArgument(f"give at least one noise level, all from 0 to {FULL:g}, and bins at least 1, not {bins}")
    counts = [0] * bins
    for level in levels:
        counts[min(bins - 1, int(level / FULL * bins))] += 1
    return counts


def fit_schedule(
    errors: Tensor,
    budget: float,
    *,
    stops: Mapping[int, int] | None = None,
    steps: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    monotone: bool = False,
) -> TimeSchedule:
    """Return the time_schedule with the least total error whose steps run at most `budget` of the model's blocks.

    errors: [bins, depths], how wrong each depth is in each bin of noise levels, clean images first and the full model
    last, as `offramp_diffusers.tune.errors` measures them; budget: share of the blocks, above 0 and up to 1; stops: the
    depths, and how many blocks run at each (`offramp_diffusers.tune.stops`), None for 1, 2, 3, ...; steps: how many of
    the solver's steps fall into each bin (`visits`), None for as many in each; weights: how much a bin's error counts,
    None for its steps over the full model's error there; monotone: never more blocks for more noise. Exact: a table
    over blocks spent (dynamic programming), bins * depths^2 * steps entries. Raises `BadArgument` where nothing fits
    the budget.
    """
    table = errors.detach().double().cpu().tolist() if isinstance(errors, Tensor) and errors.dim() == 2 else []
    if not table or not table[0] or not all(math.isfinite(e) for row in table for e in row):
        raise BadArgument("errors must be a finite tensor [bins, depths], as offramp_diffusers.tune.errors returns it")
    bins = len(table)
    stops = {k: k for k in range(1, len(table[0]) + 1)} if stops is None else stops
    depths, costs = list(stops), list(stops.values())
    if len(depths) != len(table[0]) or costs != sorted(costs) or min(costs) < 1:
        raise BadArgument(
            f"stops={dict(stops)} must say how many blocks run at each of the {len(table[0])} depths that there are "
            f"errors of, rising: offramp_diffusers.tune.stops(model)"
        )
    count = [1] * bins if steps is None else list(steps)
    # errors of the full model differ 400 times between little and much noise: as they are, they left the noisy bins two
    # blocks, and the digits of the demo were 26 % further from the data at 45 % of the blocks, against 17 % this way
    least = SMALL * max(max(row) for row in table)
    share = [c / max(row[-1], least, SMALL) for c, row in zip(count, table, strict=False)]
    share = share if weights is None else list(weights)
    if len(count) != bins or len(share) != bins or min(count) < 0 or not sum(count) or min(share) < 0:
        raise BadArgument(f"steps and weights need one number from 0 on for each of the {bins} bins")
    if not 0 < budget <= 1:
        raise BadArgument(f"budget={budget!r} is the share of blocks that may run: above 0 and up to 1")
    most = math.floor(budget * costs[-1] * sum(count) + 1e-9)
    if most < costs[0] * sum(count):
        raise BadArgument(
            f"budget={budget} is {most} blocks for {sum(count)} steps, fewer than {costs[0]} each; "
            f"give at least {costs[0] / costs[-1]:.3g}"
        )
    return TimeSchedule(tuple(depths[i] for i in _solve(table, costs, count, share, most, monotone)))


def _solve(
    table: Sequence[Sequence[float]],
    costs: Sequence[int],
    count: Sequence[int],
    share: Sequence[float],
    most: int,
    monotone: bool,
) -> list[int]:
    """Return the place of each bin's depth in `costs`. best[spent, last]: least error from the clean end on, and the
    places that reach it."""
    deepest = len(costs) - 1
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, deepest): (0.0, ())}
    for row, steps, weight in zip(table, count, share, strict=True):
        found: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (spent, last), (error, path) in best.items():
            for k in range((last if monotone else deepest) + 1):
                total = spent + steps * costs[k]
                if total > most:
                    break
                key = (total, k if monotone else deepest)
                reached = (error + weight * row[k], (*path, k))
                if key not in found or reached < found[key]:
                    found[key] = reached
        best = found
    return list(min(best.values())[1])
