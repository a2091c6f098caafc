"""Shares of the rows per exit by exponential weights: little to exits that err, within the budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from offramp._registry import register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator, Losses
from offramp.calibrators._quota import answer, asked_budget, fill, usable
from offramp.calibrators._thresholds import sureness, threshold_policy
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.trace import Trace


@register("exponential_weights")
@dataclass(frozen=True)
class ExponentialWeights(Calibrator):
    """Give exit k the share pi_k proportional to exp(-beta (risk_k + lam cost_k)), lam such that the budget is met.

    budget: mean cost per row in the unit of `trace.costs`, midway between the first exit and the full model when None;
    beta: weight of the risks against even shares, above 0; rounds: how often the risks are measured again on the rows
    that each exit keeps (0: on all rows). risk_k is the share of labelled rows that exit k answers wrong, without
    labels of rows on which it differs from the full model. Each exit keeps its surest rows. Uncertified. Raises
    `BadArgument`. Paper: EERO (arXiv 2402.03779), reconstructed from its abstract: the best shares are those of least
    mean risk + (1 / beta) KL(shares from even ones) at that mean cost.
    """

    takes = ThresholdPolicy
    budget: float | None = None
    beta: float = 20.0
    rounds: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not 0 < self.beta < np.inf:
            raise BadArgument(f"exponential_weights: beta must be a number above 0, not {self.beta!r}")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 0:
            raise BadArgument(f"exponential_weights: rounds must be a whole number from 0 on, not {self.rounds!r}")

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the policy with one threshold per exit; alpha and delta are not used, risk is measured."""
        score = threshold_policy(policy, "exponential_weights")
        table, wrong, costs = sureness(trace, score), _wrong(trace), np.asarray(trace.costs)
        columns = usable(table)
        asked = asked_budget(trace, self.budget, "exponential_weights", columns)

        def weigh(errors: Losses) -> Losses:
            shares = np.zeros(len(costs))
            shares[columns] = weights(errors[columns], costs[columns], asked, self.beta)
            return shares

        shares = weigh(np.nanmean(wrong, 1))
        found = fill(table, shares)
        for _ in range(self.rounds):
            kept = [wrong[k, found[1] == k] for k in range(len(costs))]
            errors = [np.nanmean(w) if np.isfinite(w).any() else np.nanmean(wrong[k]) for k, w in enumerate(kept)]
            shares = weigh(np.array(errors))
            found = fill(table, shares)
        said = ", ".join(f"{s:.3f}" for s in shares)
        made, note = answer(trace, score, found, risk, f"shares {said} for budget {asked:.4g} {trace.unit}")
        return Calibration(made, None, note)


def weights(risks: Losses, costs: Losses, budget: float, beta: float) -> Losses:
    """Return the shares [K]; the budget binds only where shares without it would cost more. All arrays are [K]."""
    from scipy.optimize import brentq

    unit = costs / costs[-1]  # so that the bracket below does not depend on the unit

    def shares(lam: float) -> Losses:
        power = -beta * (risks + lam * unit)
        share = np.exp(power - power.max())
        return np.asarray(share / share.sum(), np.float64)

    def over(lam: float) -> float:
        return float(shares(lam) @ costs - budget)

    if over(0.0) <= 0:
        return shares(0.0)
    high = 1.0
    while over(high) > 0:  # ends: all weight goes to the cheapest exit, which the budget exceeds
        high *= 2
    return shares(float(brentq(over, 0.0, high, xtol=1e-14)))


def _wrong(trace: Trace) -> Losses:
    """Return [K, N] of 1 where a column answers wrong, else 0; NaN where the row has no label."""
    labelled = trace.labelled
    if trace.targets is None or labelled is None:
        return (trace.label != trace.label[:, -1:]).T.double().numpy()
    wrong = (trace.label != trace.targets[:, None]).T.double()
    return torch.where(labelled, wrong, torch.nan).numpy()
