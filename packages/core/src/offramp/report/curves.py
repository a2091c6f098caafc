"""What a report says about a trace: agreement of every exit, and quality against depth and cost of policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offramp._registry import lookup, names
from offramp.calibration import Calibration
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy
from offramp.simulate import simulate
from offramp.trace import Trace

POLICIES = ("confidence", "margin", "entropy", "patience", "fixed", "saturation")
#: settings simulated per policy: more would not be seen in a picture
MOST = 40


def summary(
    trace: Trace, chosen: Calibration | None = None, policies: Sequence[str] | None = POLICIES
) -> dict[str, Any]:
    """Return plain JSON values: rows, depths, agreement of each exit, the curves, and where `chosen` lies.

    policies: names, None for all that have a curve. With labels the full model's accuracy and cost are there too.
    """
    same = (trace.label == trace.label[:, -1:]).double().mean(0).tolist()
    body: dict[str, Any] = {
        "rows": len(trace),
        "depths": list(trace.depths),
        "data_hash": trace.data_hash,
        "exit_agreement": {str(d): round(a, 6) for d, a in zip(trace.depths, same, strict=True)},
        "curves": curves(trace, policies),
    }
    full = simulate(trace, "never")
    if full.accuracy is not None:
        body |= {"full_accuracy": full.accuracy, "full_cost": full.cost_mean, "unit": trace.unit}
    if chosen is not None:
        body["chosen"] = {"policy": chosen.policy.config(), **_point(trace, chosen.policy)}
    return body


def curve(trace: Trace, name: str) -> list[dict[str, Any]]:
    """Return points {setting, depth_mean, cost_mean, agreement, saved} by depth, with labels `accuracy` too; none where
    the policy does not fit the trace.
    """
    try:
        rungs = (
            lookup(ExitPolicy, name).example(trace.depths[:-1], trace.classes).ladder(trace.depths[:-1], trace.classes)
        )
        points = [{"setting": _setting(rung), **_point(trace, rung)} for rung in _thin(rungs)]
    except BadArgument:  # e.g. patience with one exit, or a statistic that the trace does not hold
        return []
    seen: dict[tuple[Any, Any], dict[str, Any]] = {}
    for point in points:
        seen.setdefault((point["depth_mean"], point["agreement"]), point)
    return sorted(seen.values(), key=lambda p: (p["depth_mean"], p["agreement"]))


def curves(trace: Trace, policies: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return the curve of each policy that has one on this trace, by name; None tries all that exist."""
    wanted = names(ExitPolicy) if policies is None else policies
    return {name: found for name in wanted if (found := curve(trace, name))}


def at_cost(points: Sequence[Mapping[str, Any]], cost: float, what: str = "accuracy") -> float | None:
    """Return the best `what` of a curve's points at this mean cost, in the trace's unit; None where all cost more.

    A coin between two settings spends and earns in between, so the upper hull of the points is what counts.
    """
    reach = [(p["cost_mean"], p[what]) for p in points if what in p]
    best: float | None = max((value for spent, value in reach if spent <= cost), default=None)
    for low, below in reach:
        for high, above in reach:
            if low < cost < high:
                mixed = below + (above - below) * (cost - low) / (high - low)
                best = mixed if best is None else max(best, mixed)
    return best


def _thin(rungs: Sequence[ExitPolicy]) -> list[ExitPolicy]:
    """Return at most MOST rungs, evenly, with both ends."""
    if len(rungs) <= MOST:
        return list(rungs)
    return [rungs[round(i * (len(rungs) - 1) / (MOST - 1))] for i in range(MOST)]


def _point(trace: Trace, policy: ExitPolicy) -> dict[str, float]:
    out = simulate(trace, policy)
    found = {k: round(getattr(out, k), 6) for k in ("depth_mean", "cost_mean", "agreement", "saved")}
    return found if out.accuracy is None else {**found, "accuracy": round(out.accuracy, 6)}


def _setting(policy: ExitPolicy) -> Mapping[str, Any]:
    return {k: v for k, v in policy.config().items() if k != "policy"}
