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
    A share of less than one row closes an exit; rows as sure as the last one leave with it. What an exit cannot fill,
    as too few rows have a score there, goes to the next: else fewer rows would leave early the more are to leave first.
    Paper: MSDNet (Huang et al., arXiv 1703.09844).
    """
    n, over = sure.shape[1], 0
    alive, columns = np.arange(n), np.full(n, len(sure))
    cuts: list[float | None] = []
    for column, row in enumerate(sure):
        here = row[alive]
        able = int(np.count_nonzero(here > -np.inf))
        wanted = math.floor(n * shares[column] + 1e-9) + over  # 9 * (1/3) may be 2.9999999
        quota = min(able, wanted)
        over = wanted - quota
        if quota < 1:
            cuts.append(None)
            continue
        cut = np.partition(here, len(here) - quota)[len(here) - quota]
        stop = here >= cut
        columns[alive[stop]] = column
        alive = alive[~stop]
        cuts.append(float(cut))
    return tuple(cuts), columns


def geometric(q: float, exits: int, columns: Counts | None = None) -> Losses:
    """Return shares [exits] proportional to q, q^2, ..., q^exits; only those of `columns`, where given, and 0 else."""
    kept = np.arange(exits) if columns is None else columns
    power = math.log(q) * np.arange(1, len(kept) + 1)
    share, out = np.exp(power - power.max()), np.zeros(exits)
    out[kept] = share / share.sum()
    return out


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


def usable(sure: Sureness) -> Counts:
    """Return the columns at which rows can leave, the full model among them; a cosine has no score at the first exit.
    """
    return np.append(np.nonzero((sure > -np.inf).any(1))[0], len(sure))


def asked_budget(trace: Trace, budget: float | None, method: str, columns: Counts) -> float:
    """Return the budget, midway between the usable columns for None; raises `BadArgument` unless these can meet it.

    A budget is a mean cost per row in the trace's own unit, between those of the first exit and of the full model.
    """
    costs, unit, first = np.asarray(trace.costs), trace.unit, int(columns[0])
    middle = float(costs[first] + costs[-1]) / 2
    asked: Any = middle if budget is None else budget
    if first == len(costs) - 1:
        raise BadArgument(f"{method}: the policy has no score at any exit, so no row could leave; use another policy")
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not costs[first] < asked < costs[-1]:
        raise BadArgument(
            f"{method}: budget={asked!r} must lie between {costs[first]:g} {unit} (all rows leave at depth "
            f"{trace.depths[first]}) and {costs[-1]:g} {unit} (the full model), both excluded; e.g. budget={middle:g}"
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
