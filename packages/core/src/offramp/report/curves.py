"""What a report says about a trace: agreement of every exit, and quality against depth of several policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offramp._registry import lookup
from offramp.calibration import Calibration
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy
from offramp.trace import Trace, simulate

POLICIES = ("confidence", "margin", "entropy", "patience", "fixed", "saturation")
#: settings simulated per policy: more would not be seen in a picture
MOST = 40


def summary(trace: Trace, chosen: Calibration | None = None, policies: Sequence[str] = POLICIES) -> dict[str, Any]:
    """Return plain JSON values: rows, depths, agreement of each exit, the curves, and where `chosen` lies."""
    same = (trace.label == trace.label[:, -1:]).double().mean(0).tolist()
    body: dict[str, Any] = {
        "rows": len(trace),
        "depths": list(trace.depths),
        "data_hash": trace.data_hash,
        "exit_agreement": {str(d): round(a, 6) for d, a in zip(trace.depths, same, strict=True)},
        "curves": {name: found for name in policies if (found := curve(trace, name))},
    }
    if chosen is not None:
        body["chosen"] = {"policy": chosen.policy.config(), **_point(trace, chosen.policy)}
    return body


def curve(trace: Trace, name: str) -> list[dict[str, Any]]:
    """Return points {setting, depth_mean, agreement, saved} by depth; none where the policy does not fit the trace."""
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


def _thin(rungs: Sequence[ExitPolicy]) -> list[ExitPolicy]:
    """Return at most MOST rungs, evenly, with both ends."""
    if len(rungs) <= MOST:
        return list(rungs)
    return [rungs[round(i * (len(rungs) - 1) / (MOST - 1))] for i in range(MOST)]


def _point(trace: Trace, policy: ExitPolicy) -> dict[str, float]:
    out = simulate(trace, policy)
    return {k: round(getattr(out, k), 6) for k in ("depth_mean", "agreement", "saved")}


def _setting(policy: ExitPolicy) -> Mapping[str, Any]:
    return {k: v for k, v in policy.config().items() if k != "policy"}
