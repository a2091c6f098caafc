"""One threshold per exit: the boldest at which the exit agrees with the full model often enough."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from offramp._registry import register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator
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
        if not isinstance(policy, ThresholdPolicy):
            raise BadArgument(
                f"per_exit sets one threshold per exit, and {type(policy).__name__} has none; use e.g. 'entropy'"
            )
        depths = trace.depths[:-1]
        rungs: list[Any] = list(policy.ladder(depths, trace.classes))
        found = tuple(self._best(trace, policy, rungs, column) for column in range(len(depths)))
        made: Any = dataclasses.replace(policy, threshold=found)  # type: ignore[type-var]
        note = (
            f"uncertified: each exit alone agrees with the full model on {self.agreement:.0%} of the rows it stops (of "
            f"{len(trace)}); draft with it (verify=True), or certify with method='fixed_sequence'"
        )
        return Calibration(made, None, note)

    def _best(self, trace: Trace, policy: ThresholdPolicy, rungs: list[Any], column: int) -> float:
        seen = trace.evidence(column, torch.arange(len(trace)))
        same = trace.label[:, column] == trace.label[:, -1]
        best: float = rungs[0].threshold
        for rung in rungs:  # from safest to boldest; agreement need not fall all the way
            stop = policy.stops(seen, rung.threshold)
            if bool(stop.any()) and float(same[stop].double().mean()) >= self.agreement:
                best = rung.threshold
        return best
