"""One threshold per exit so that rows cost, on average, what was asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from offramp._registry import register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator
from offramp.calibrators._quota import answer, asked_budget, bisect, geometric, usable
from offramp.calibrators._thresholds import sureness, threshold_policy
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.trace import Trace


@register("budget")
@dataclass(frozen=True)
class Budget(Calibrator):
    """Let exit k keep a share proportional to q^k of all rows, its surest ones, with the q that meets the budget.

    budget: mean cost per row in the unit of `trace.costs`, midway between the first exit and the full model when None.
    q is bisected until the mean cost on the trace is within 0.01 % below the budget, or on the nearest step. Nothing is
    promised about the risk, so the calibration is uncertified. Raises `BadArgument` for a budget that no threshold
    meets. Paper: MSDNet (Huang et al., arXiv 1703.09844), which tries q = 0.05, 0.1, ..., 1.95.
    """

    takes = ThresholdPolicy
    budget: float | None = None

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the policy with one threshold per exit; alpha and delta are not used, risk is measured."""
        score = threshold_policy(policy, "budget")
        table, costs = sureness(trace, score), np.asarray(trace.costs)
        columns = usable(table)
        asked = asked_budget(trace, self.budget, "budget", columns)
        found = bisect(table, costs, asked, lambda t: geometric(math.exp(t), len(costs), columns))
        made, note = answer(trace, score, found, risk, f"budget {asked:.4g} {trace.unit}")
        return Calibration(made, None, note)
