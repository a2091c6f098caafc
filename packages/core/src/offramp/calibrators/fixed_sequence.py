"""Learn-then-Test with a fixed sequence: walk from safe to bold, stop at the first failure."""

from __future__ import annotations

from dataclasses import dataclass

from offramp._registry import register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator
from offramp.calibrators._walk import Promise as Promise
from offramp.calibrators._walk import certify
from offramp.calibrators._walk import walk as walk
from offramp.policy import ExitPolicy
from offramp.trace import Trace


@register("fixed_sequence")
@dataclass(frozen=True)
class FixedSequence(Calibrator):
    """Certify the boldest rung of the policy's ladder before the first p-value above delta.

    The ladder is fixed before the data is seen, so no correction for the number of thresholds is needed. Exact
    binomial test for 0/1 losses, Hoeffding-Bentkus otherwise. The promise holds for rows drawn independently from
    where the trace's rows come from. Papers: Learn then Test (Angelopoulos et al., arXiv 2110.01052), CALM (arXiv
    2207.07061).
    """

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the certified policy, or `never` without a certificate and a note that says why."""
        return certify(trace, policy, alpha=alpha, delta=delta, risk=risk)
