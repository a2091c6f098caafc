"""Learn-then-Test with a fixed sequence: walk from safe to bold, stop at the first failure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from offramp._registry import create, register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator, Certificate, Losses
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy
from offramp.pvalues import binomial_p, hoeffding_bentkus_p, rows_needed
from offramp.risks import find_risk, losses
from offramp.trace import Trace, exit_columns


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
        ladder = policy.ladder(trace.depths[:-1], trace.classes)
        table = (losses(trace, exit_columns(trace, rung), risk) for rung in ladder)
        promise = Promise(risk, find_risk(risk).binary, alpha, delta, trace.data_hash, trace.model_hash)
        return walk(ladder, table, promise)


@dataclass(frozen=True)
class Promise:
    """What a walk is to promise: fields as in `Certificate`; binary: whether losses are only ever 0 or 1."""

    risk: str
    binary: bool
    alpha: float
    delta: float
    data_hash: str
    model_hash: str

    def p_value(self, mean: float, n: int) -> float:
        """Return the p-value of "the risk is above alpha" for n losses with this mean."""
        return (
            binomial_p(math.ceil(mean * n - 1e-9), n, self.alpha)
            if self.binary
            else hoeffding_bentkus_p(mean, n, self.alpha)
        )


def walk(ladder: Sequence[ExitPolicy], table: Iterable[Losses], promise: Promise) -> Calibration:
    """Return the boldest rung of `ladder` before the first p-value above delta, certified; `never` when none passes.

    table: for each rung from the safest on, one loss [n] in [0, 1] per independent row; it may end before the ladder
    does, where nothing bolder was measured, and is read no further than the walk goes. Raises `BadArgument` without
    rows.
    """
    best: tuple[ExitPolicy, float] | None = None
    found, p = None, 1.0
    for rung, found in zip(ladder, table, strict=False):
        if not len(found):
            raise BadArgument(
                "no row of the trace has a label, so this risk cannot be measured; record data with labels"
            )
        p = promise.p_value(float(found.mean()), len(found))
        if not p <= promise.delta:
            break
        best = rung, p
    if found is None or best is None:
        return Calibration(create(ExitPolicy, "never"), None, _why(found, p, promise))
    certificate = Certificate(
        risk=promise.risk,
        alpha=float(promise.alpha),
        delta=float(promise.delta),
        n=len(found),
        p_value=best[1],
        test="binomial" if promise.binary else "hoeffding_bentkus",
        order=settings(ladder),
        data_hash=promise.data_hash,
        model_hash=promise.model_hash,
    )
    return Calibration(best[0], certificate)


def settings(ladder: Sequence[ExitPolicy]) -> tuple[Any, ...]:
    """Return what changes from rung to rung: one value each if a single option does, else whole configs."""
    flat = [_flat(rung.config()) for rung in ladder]
    changing = [k for k in flat[0] if any(f.get(k) != flat[0][k] for f in flat)] if flat else []
    return tuple(f[changing[0]] for f in flat) if len(changing) == 1 else tuple(rung.config() for rung in ladder)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _why(found: Losses | None, p: float, promise: Promise) -> str:
    if found is None:
        return "uncertified: the policy offers no threshold to try"
    alpha, delta = promise.alpha, promise.delta
    least, n, mean = rows_needed(alpha, delta), len(found), float(found.mean())
    said = (
        f"uncertified: at the safest setting {promise.risk} was {mean:.4g} on {n} rows (p = {p:.3g}, "
        f"needed <= {delta:g}). "
    )
    if n < least:
        return said + f"At least {least} rows are needed even without a single loss; record more."
    if mean >= alpha:
        return (
            said + f"That is not below alpha = {alpha:g}, so more rows would not help: raise alpha or fit better heads."
        )
    return said + f"About {_enough(mean, n, promise)} rows would do at this risk; record more."


def _enough(mean: float, n: int, promise: Promise) -> int:
    """Return about how many rows certify a mean loss below alpha: the first of n, 1.1 n, 1.21 n, ... that does."""
    for _ in range(200):  # 1.1^200 = 2e8 times as many: nobody records more
        if promise.p_value(mean, n) <= promise.delta:
            break
        n = math.ceil(1.1 * n)
    return n
