"""One threshold per exit: the boldest at which the exit agrees with the full model often enough."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp._registry import register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator, Losses
from offramp.calibrators._thresholds import Counts, first_rungs, sureness, threshold_policy
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.trace import Trace


@register("per_exit")
@dataclass(frozen=True)
class PerExit(Calibrator):
    """For each exit on its own, take the boldest threshold at which the rows it stops agree in at least this share.

    agreement: share in ]0, 1[; the paper has 0.60 to 0.99. An exit that is never that good gets the safest threshold.
    Exits are looked at alone, so nothing is promised about them together: made for drafts that are verified (draft
    rule "dssd"). Raises `BadArgument`. Paper: arXiv 2407.21082 (its strategy of most coverage).
    """

    takes = ThresholdPolicy
    agreement: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.agreement, bool) or not 0 < self.agreement < 1:
            raise BadArgument(f"per_exit: agreement must be a share between 0 and 1, not {self.agreement!r}")

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the policy with one threshold per exit; alpha, delta and risk are not used."""
        score = threshold_policy(policy, "per_exit")
        grid, rungs = first_rungs(sureness(trace, score), score, trace.classes)
        same = (trace.label[:, :-1] == trace.label[:, -1:]).numpy()
        found = tuple(grid[self._best(row, same[:, column], len(grid))] for column, row in enumerate(rungs))
        made: Any = dataclasses.replace(score, threshold=found)  # type: ignore[type-var]
        note = (
            f"uncertified: each exit alone agrees with the full model on {self.agreement:.0%} of the rows it stops (of "
            f"{len(trace)}); draft with it (verify=True), or certify with method='fixed_sequence'"
        )
        return Calibration(made, None, note)

    def _best(self, first: Counts, same: Losses, size: int) -> int:
        """Return the boldest rung whose stopped rows agree often enough; agreement need not fall all the way."""
        stopped = np.cumsum(np.bincount(first, minlength=size + 1))[:size]
        agree = np.cumsum(np.bincount(first, same, size + 1))[:size]
        able = np.nonzero((stopped > 0) & (agree >= self.agreement * stopped))[0]
        return int(able[-1]) if len(able) else 0
