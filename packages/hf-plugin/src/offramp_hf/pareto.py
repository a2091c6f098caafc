"""Which settings nothing beats on both counts, and which trials can no longer become one of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

#: confidence of the optimistic corner: one trial in ten that deserved better is dropped; prompts seen before any is
CONFIDENCE, WARMUP = 0.9, 3


@dataclass(frozen=True)
class Point:
    """One setting. speed: ratio to plain generation; agreement: share of tokens that the full model chooses; flag: its
    `early_exit` dict; number: of the trial.
    """

    speed: float
    agreement: float
    flag: dict[str, Any]
    number: int = -1


def dominates(speed: float, agreement: float, over_speed: float, over_agreement: float) -> bool:
    """Whether the first pair is at least as good on both counts and better on one."""
    return speed >= over_speed and agreement >= over_agreement and (speed > over_speed or agreement > over_agreement)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other dominates, fastest first."""
    kept = [p for p in points if not any(dominates(q.speed, q.agreement, p.speed, p.agreement) for q in points)]
    return sorted(kept, key=lambda p: p.speed, reverse=True)


def corner(ratios: Sequence[float], agreements: Sequence[float]) -> tuple[float, float]:
    """Return the best plausible (speed, agreement) from the prompts seen so far: upper confidence limits.

    Of the speed, Student's limit of the mean logarithm of the ratios; of the agreement, the exact binomial limit with
    each prompt as one observation, since the tokens of one text are not independent. Syftr's optimistic corner.
    """
    n = len(ratios)
    logs = [math.log(r) for r in ratios]
    wide = stats.t.ppf(CONFIDENCE, n - 1) * statistics.stdev(logs) / math.sqrt(n) if n > 1 else math.inf
    right = sum(agreements)
    quality = 1.0 if right >= n else float(stats.beta.ppf(CONFIDENCE, right + 1, n - right))
    return math.exp(statistics.fmean(logs) + wide), quality


def hopeless(ratios: Sequence[float], agreements: Sequence[float], points: Sequence[Point]) -> bool:
    """Whether even the optimistic corner of a trial is dominated by what is known; never before `WARMUP` prompts."""
    if len(ratios) < WARMUP:
        return False
    best = corner(ratios, agreements)
    return any(dominates(p.speed, p.agreement, *best) for p in points)
