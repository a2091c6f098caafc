"""What calibrators of thresholds share: one table of how sure each exit is of each row, and thresholds put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from offramp._registry import create
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.simulate import check_holds
from offramp.trace import Trace

#: [exits, rows] of how sure an exit is; larger is surer, -inf never stops
Sureness = np.ndarray[Any, np.dtype[np.float32]]
#: [exits, rows] of whole numbers
Counts = np.ndarray[Any, np.dtype[np.int64]]
#: by how much a score computed in float32 may exceed the largest that there is
ROUNDING = 1e-5


def simple(policy: ExitPolicy) -> bool:
    """Whether the policy compares one stateless score with one threshold and its ladder is its grid."""
    cls = type(policy)
    return isinstance(policy, ThresholdPolicy) and all(
        getattr(cls, name) is getattr(ThresholdPolicy, name) for name in ("start", "step", "stops", "ladder")
    )


def threshold_policy(policy: ExitPolicy, method: str, exact: bool = False) -> ThresholdPolicy:
    """Return the policy; raises `BadArgument` unless it compares one score with one threshold per exit.

    exact: it must do so as `ThresholdPolicy` does, as certificates need, and not in a way of its own, such as letting
    scores that equal the threshold pass on the other side.
    """
    if isinstance(policy, ThresholdPolicy) and (simple(policy) or not exact):
        return policy
    raise BadArgument(
        f"{method} sets one threshold per exit, and {type(policy).__name__} has none that it could set; use e.g. "
        f'"confidence", "margin" or "entropy"'
    )


def sureness(trace: Trace, policy: ThresholdPolicy) -> Sureness:
    """Return the score of every exit but the last column, turned so that larger is surer: [exits, rows] float32.

    Rows that the engine never stops (not finite) have -inf. Raises `BadArgument` when the trace lacks a statistic.
    """
    check_holds(trace, policy)
    table = np.empty((len(trace.depths) - 1, len(trace)), np.float32)
    for column, out in enumerate(table):
        seen = trace.evidence(column, None, policy.statistics())
        score = policy.score(seen) if type(policy).safer == "up" else -policy.score(seen)
        if "top1" in seen.stats:
            score = torch.where(seen.stats["top1"].isfinite(), score, -torch.inf)
        out[:] = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).numpy()
    return table


def first_rungs(sure: Sureness, policy: ThresholdPolicy, classes: int) -> tuple[list[float], Counts]:
    """Return the policy's grid, safest first, and the first place in it at which each exit stops each row.

    The place is the length of the grid where no rung does. Compared in float32, as tensors compare with a number.
    """
    grid = list(policy.grid(classes))
    up = type(policy).safer == "up"
    steps = np.array(grid, np.float32) * np.float32(-1 if up else 1)  # ascending
    # up: stops when -sure <= -t, so at the first -t >= -sure; down: when score = -sure < t, so at the first t > -sure
    rungs = np.stack([np.searchsorted(steps, -row, side="left" if up else "right") for row in sure])
    rungs[sure == -np.inf] = len(grid)
    return grid, rungs


def threshold_at(policy: ThresholdPolicy, sure: float) -> float:
    """Return the threshold, in the policy's own unit, that stops the rows that are at least so sure and no others."""
    if type(policy).safer == "up":
        return float(sure)
    return float(np.nextafter(np.float32(-sure), np.float32(np.inf)))  # these stop strictly below


def with_thresholds(
    trace: Trace, policy: ThresholdPolicy, values: Sequence[float | None], last: int | None = None
) -> ExitPolicy:
    """Return the policy at one threshold per exit; None closes an exit, `last` is the column at which all rows leave.

    The policy itself where every exit is open, wrapped in `budgeted` where some are closed or one is the last, and
    `never` where none is left.
    """
    if last is None and all(v is None for v in values):
        return create(ExitPolicy, "never")  # type: ignore[no-any-return]
    grid = policy.grid(trace.classes)
    kept = tuple(float(grid[0]) if v is None else _allowed(float(v), grid) for v in values)
    made: Any = dataclasses.replace(policy, threshold=kept)  # type: ignore[type-var]
    closed = tuple(d for d, v in zip(trace.depths, values, strict=False) if v is None)
    if last is None and not closed:
        return made  # type: ignore[no-any-return]
    depth = None if last is None else trace.depths[last]
    closed = tuple(d for d in closed if d != depth)
    return create(ExitPolicy, "budgeted", inner=made, closed=closed, last=depth)  # type: ignore[no-any-return]


def _allowed(value: float, grid: Sequence[float]) -> float:
    """Return a threshold that a policy takes: rounding may have put a cosine above 1, or a gate's probability at 0."""
    if grid[-1] < grid[0] < value <= grid[0] + ROUNDING:
        return float(grid[0])
    return float(np.finfo(np.float32).tiny) if value == 0 < grid[-1] < grid[0] else value
