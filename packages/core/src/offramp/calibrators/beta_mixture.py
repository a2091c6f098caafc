"""One threshold per exit from how the scores of right and of wrong answers are spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp._registry import register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator, Losses
from offramp.calibrators._thresholds import Sureness, sureness, threshold_policy, with_thresholds
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.trace import Trace

#: scores are kept this far from 0 and 1, where the densities have no bounds
EDGE = 1e-4


@register("beta_mixture")
@dataclass(frozen=True)
class BetaMixture(Calibrator):
    """Describe the scores of answers that agree with the full model, and of those that do not, by a Beta distribution
    each; open an exit from the score on where the share of the first density in the sum of both stays above zeta.

    zeta: between 0 and 1, higher is safer; shares: weigh the densities by how many rows they describe, so that zeta is
    a probability of agreement, in place of alike. Scores are scaled to [0, 1] by the policy's grid. An exit that is
    never wrong opens fully, one that is never right stays closed. Uncertified. Raises `BadArgument`. Paper: FREE (Bae
    et al., arXiv 2310.05424), which estimates one threshold while it decodes: that is the policy of this name.
    """

    takes = ThresholdPolicy
    zeta: float = 0.4
    shares: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.zeta, bool) or not isinstance(self.zeta, (int, float)) or not 0 < self.zeta < 1:
            raise BadArgument(f"beta_mixture: zeta must be a number between 0 and 1, not {self.zeta!r}")
        if not isinstance(self.shares, bool):
            raise BadArgument(f"beta_mixture: shares must be True or False, not {self.shares!r}")

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the policy with one threshold per exit; alpha, delta and risk are not used."""
        score = threshold_policy(policy, "beta_mixture")
        grid = list(score.grid(trace.classes))
        turn = 1.0 if type(score).safer == "up" else -1.0
        steps = turn * np.array(grid)  # falls from surest on
        agrees = (trace.label == trace.label[:, -1:]).numpy()
        found: list[float | None] = []
        for column, row in enumerate(sureness(trace, score)):
            scaled = (row - steps[-1]) / (steps[0] - steps[-1])
            rung = self._rung(scaled, agrees[:, column], (steps - steps[-1]) / (steps[0] - steps[-1]))
            found.append(None if rung is None else grid[rung])
        note = (
            f"uncertified: thresholds from the spread of scores that agree with the full model and of those that do "
            f"not, on {len(trace)} rows; certify with method='fixed_sequence' on a trace of other rows"
        )
        return Calibration(with_thresholds(trace, score, found), None, note)

    def _rung(self, scaled: Sureness, agrees: Losses, steps: Losses) -> int | None:
        """Return the boldest place in `steps` down to which the share of the right density stays above zeta."""
        seen = np.isfinite(scaled)
        kept, right = np.clip(scaled[seen].astype(np.float64), EDGE, 1 - EDGE), agrees[seen].astype(bool)
        if not right.any():
            return None
        if right.all():
            return len(steps) - 1
        odds = log_density(kept[right], steps) - log_density(kept[~right], steps)
        if self.shares:
            odds += np.log(right.mean() / (1 - right.mean()))
        above = odds > np.log(self.zeta / (1 - self.zeta))
        stays = int(above.argmin()) if not above.all() else len(steps)
        return stays - 1 if stays else None


def log_density(scores: Losses, at: Losses) -> Losses:
    """Return the log density at points in [0, 1] of the Beta distribution with the mean and variance of `scores`."""
    from scipy.stats import beta

    mean, variance = scores.mean(), max(float(scores.var()), EDGE * EDGE)
    strength = max(mean * (1 - mean) / variance - 1, EDGE)
    found: Losses = beta.logpdf(np.clip(at, EDGE, 1 - EDGE), mean * strength, (1 - mean) * strength)
    return found
