"""Bound what leaving early costs: on average, or for the rows that have left by each exit, whichever exit that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from offramp._registry import create, register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator, Certificate, Losses
from offramp.calibrators._thresholds import Counts, first_rungs, sureness, threshold_policy, with_thresholds
from offramp.calibrators._walk import Promise, certify
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy
from offramp.pvalues import rows_needed
from offramp.risks import find_risk, table
from offramp.trace import Trace

#: p-value of "the risk is above alpha" from the mean loss of n rows
Test = Callable[[float, int], float]
#: part of delta at which thresholds are proposed: what only just passes on one half often fails on the other. On 200
#: draws of 600 digits (entropy, alpha 0.03, delta 0.1) what opened saved 16 % at p <= 0.5, 24 % at delta, 31 % at
#: 0.3 delta, 26 % at 0.1 delta and 18 % at 0.03 delta; the promise does not depend on it
STRICT = 0.25


@register("accuracy_gap")
@dataclass(frozen=True)
class AccuracyGap(Calibrator):
    """Certify that early exit loses at most alpha of the accuracy: on average, or among all that left by any exit.

    conditional: False for the average, which a few easy early rows can pay for; True to bound the mean loss of the rows
    that have left by exit k, for every k at once. For that, one random half of the rows (of `seed`) proposes for each
    exit from the shallowest on the boldest threshold that passes the test at delta / 4; the other half opens the exits
    from the deepest on and stops at the first that fails the test for any set of rows it changes. Certificates of the
    latter have "by every exit" in `test`, n of the second half, and in `order` the exits opened with their thresholds.
    Raises `BadArgument`. Paper: Ringel et al., Early Time Classification with Accumulated Accuracy Gap Control (ICML
    2024), which proposes by the mean loss (at most alpha) instead of a test.
    """

    takes = ExitPolicy
    risk: ClassVar[str] = "accuracy_drop"
    conditional: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.conditional, bool):
            raise BadArgument(f"accuracy_gap: conditional must be True or False, not {self.conditional!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise BadArgument(f"accuracy_gap: seed must be a whole number from 0 on, not {self.seed!r}")

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the certified policy, or `never` without a certificate and a note that says why."""
        if not self.conditional:
            return certify(trace, policy, alpha=alpha, delta=delta, risk=risk)
        score = threshold_policy(policy, "accuracy_gap with conditional=True", exact=True)
        cost, mask = table(trace, risk, len(trace.depths) - 1)
        kept = mask.nonzero()[0]
        grid, rungs = first_rungs(sureness(trace, score), score, trace.classes)
        order = np.random.default_rng(self.seed).permutation(len(kept))
        ours, theirs = order[: len(kept) // 2], order[len(kept) // 2 :]
        promise = Promise(risk, find_risk(risk).binary, alpha, delta, trace.data_hash, trace.model_hash)
        proposed = propose(rungs[:, kept[ours]], cost[:, ours], len(grid), STRICT * delta, promise.p_value)
        opened, p = confirm(rungs[:, kept[theirs]], cost[:, theirs], proposed, delta, promise.p_value)
        if not opened:
            return Calibration(create(ExitPolicy, "never"), None, _why(promise, len(theirs), proposed))
        found = [grid[opened[k]] if k in opened else None for k in range(len(rungs))]
        certificate = Certificate(
            risk=risk,
            alpha=float(alpha),
            delta=float(delta),
            n=len(theirs),
            p_value=p,
            test=f"{'binomial' if promise.binary else 'hoeffding_bentkus'} by every exit",
            order=tuple((trace.depths[k], grid[rung]) for k, rung in opened.items()),
            data_hash=promise.data_hash,
            model_hash=promise.model_hash,
        )
        return Calibration(with_thresholds(trace, score, found), certificate)


def propose(rungs: Counts, cost: Losses, size: int, level: float, test: Test) -> dict[int, int]:
    """Return for each exit, from the first on, the boldest rung with p <= level for the rows that have left by it.

    rungs, cost: [exits, n]. An exit that no rung passes at, or where none makes a row leave, is left out.
    """
    found: dict[int, int] = {}
    alive = np.ones(rungs.shape[1], bool)
    left, lost = 0, 0.0
    for k, first in enumerate(rungs):
        counts = np.cumsum(np.bincount(first[alive], minlength=size + 1))[:size]
        sums = np.cumsum(np.bincount(first[alive], cost[k, alive], size + 1))[:size]
        for rung in range(size - 1, -1, -1):  # from boldest to safest
            n = left + int(counts[rung])
            if counts[rung] and test(max(0.0, lost + float(sums[rung])) / n, n) <= level:
                found[k] = rung
                left, lost = n, lost + float(sums[rung])
                alive &= first > rung
                break
    return found


def confirm(
    rungs: Counts, cost: Losses, proposed: dict[int, int], delta: float, test: Test
) -> tuple[dict[int, int], float]:
    """Return the exits opened, from the deepest on, before the first that fails, and the largest p-value accepted.

    An exit passes when for it and every deeper one the rows that have left by then have p <= delta. Opening a
    shallower exit changes who leaves at the deeper ones, so all are tested again.
    """
    opened: dict[int, int] = {}
    worst = 0.0
    for k in sorted(proposed, reverse=True):
        trial = {**opened, k: proposed[k]}
        p = _largest(rungs, cost, trial, test)
        if p > delta:
            break
        opened, worst = trial, max(worst, p)
    return opened, worst


def _largest(rungs: Counts, cost: Losses, trial: dict[int, int], test: Test) -> float:
    """Return the largest p-value over the sets of rows that have left by each open exit, and over all rows."""
    alive = np.ones(rungs.shape[1], bool)
    left, lost, p = 0, 0.0, 0.0
    for k in sorted(trial):
        stop = alive & (rungs[k] <= trial[k])
        left, lost, alive = left + int(stop.sum()), lost + float(cost[k, stop].sum()), alive & ~stop
        p = max(p, test(lost / left, left) if left else 1.0)
    return max(p, test(lost / len(alive), len(alive)))


def _why(promise: Promise, n: int, proposed: dict[int, int]) -> str:
    least = rows_needed(promise.alpha, promise.delta)
    said = f"uncertified: no exit keeps {promise.risk} at or below {promise.alpha:g} among the rows that left by it. "
    if n < least:
        return said + f"At least {2 * least} rows are needed, half of them to test on; these are {2 * n}. Record more."
    if not proposed:
        return said + "No threshold came near it: raise alpha, fit better heads, or bound the average"
    return said + "The deepest candidate did not pass on the second half of the rows: record more, or raise alpha."
