"""From the share of rows that is to leave at each exit to one cut per exit, and to what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from offramp.calibrator import Losses
from offramp.calibrators._thresholds import Counts, Sureness, threshold_at, with_thresholds
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.risks import losses
from offramp.trace import Trace

#: the least sureness that leaves, per exit; None closes it
Cuts = tuple[float | None, ...]


def fill(sure: Sureness, shares: Losses) -> tuple[Cuts, Counts]:
    """Let each exit in turn keep the rows it is surest of, up to its share of all rows.

    sure: [exits, N]; shares: [exits + 1], adding up to 1. Returns the cuts and the exit at which each row leaves [N].
    A share of less than one row closes an exit; the last rows fill it where fewer are left; rows as sure as the last
    one leave with it. Paper: MSDNet (Huang et al., arXiv 1703.09844).
    """
    n = sure.shape[1]
    alive, columns = np.arange(n), np.full(n, len(sure))
    cuts: list[float | None] = []
    for column, row in enumerate(sure):
        here = row[alive]
        able = int(np.count_nonzero(here > -np.inf))
        quota = min(able, math.floor(n * shares[column] + 1e-9))  # 9 * (1/3) may be 2.9999999
        if quota < 1:
            cuts.append(None)
            continue
        cut = np.partition(here, len(here) - quota)[len(here) - quota]
        stop = here >= cut
        columns[alive[stop]] = column
        alive = alive[~stop]
        cuts.append(float(cut))
    return tuple(cuts), columns


def geometric(q: float, exits: int) -> Losses:
    """Return the shares proportional to q, q^2, ..., q^exits."""
    power = math.log(q) * np.arange(1, exits + 1)
    share = np.exp(power - power.max())
    return np.asarray(share / share.sum(), np.float64)


def bisect(sure: Sureness, costs: Losses, budget: float, shares: Callable[[float], Losses]) -> tuple[Cuts, Counts]:
    """Return the fill whose mean cost is nearest below `budget`; `shares(t)` moves rows deeper as t grows.

    t is searched in [-40, 40]; the cost is a staircase, so the search ends within 0.01 % of the budget or on its step.
    """
    low, high = -40.0, 40.0
    best = fill(sure, shares(low))
    for _ in range(60):  # 80 / 2^60 = 7e-17
        middle = (low + high) / 2
        found = fill(sure, shares(middle))
        cost = float(costs[found[1]].mean())
        if cost > budget:
            high = middle
            continue
        low, best = middle, found
        if cost >= budget * (1 - 1e-4):
            break
    return best


def asked_budget(trace: Trace, budget: float | None, method: str) -> float:
    """Return the budget, half of the full cost for None; raises `BadArgument` unless exits can meet it.

    A budget is a mean cost per row in the trace's own unit, between those of the first exit and of the full model.
    """
    costs, unit = np.asarray(trace.costs), trace.unit
    asked: Any = float(costs[-1]) / 2 if budget is None else budget
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not costs[0] < asked < costs[-1]:
        raise BadArgument(
            f"{method}: budget={asked!r} must lie between {costs[0]:g} {unit} (all rows leave at depth "
            f"{trace.depths[0]}) and {costs[-1]:g} {unit} (the full model), both excluded; e.g. "
            f"budget={(costs[0] + costs[-1]) / 2:g}"
        )
    return float(asked)


def answer(
    trace: Trace, policy: ThresholdPolicy, found: tuple[Cuts, Counts], risk: str, asked: str
) -> tuple[ExitPolicy, str]:
    """Return the policy with these cuts, and the note of its calibration: what it costs and risks on the trace."""
    import torch

    cuts, columns = found
    made = with_thresholds(trace, policy, [None if c is None else threshold_at(policy, c) for c in cuts])
    cost = float(np.asarray(trace.costs)[columns].mean())
    loss = losses(trace, torch.from_numpy(columns), risk)
    said = f"{risk} {loss.mean():.4g}" if len(loss) else "no labels"
    return made, (
        f"uncertified: {asked} on {len(trace)} rows, mean cost {cost:.4g} {trace.unit}, {said} there; a budget holds "
        f"on average for rows of the same kind, and nothing is promised about the risk: for that use "
        f"method='fixed_sequence' or 'accuracy_gap'"
    )
