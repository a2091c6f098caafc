"""From a trace and a bound on the risk to a policy with thresholds and, where it can be given, a certificate."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from offramp._registry import create, lookup
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator
from offramp.enable import make_policy
from offramp.errors import BadArgument, check_options
from offramp.policy import ExitPolicy
from offramp.risks import find_risk
from offramp.trace import Trace


def calibrate(
    trace: Trace,
    policy: str | ExitPolicy | Calibration | Mapping[str, Any],
    *,
    method: str = "fixed_sequence",
    risk: str = "disagreement",
    alpha: float = 0.05,
    delta: float = 0.05,
    **options: Any,
) -> Calibration:
    """Choose thresholds for a policy on a trace so that the risk is at most alpha with confidence 1 - delta.

    policy: a name (its threshold is what is looked for) or an object, calibration or config, of which all but the
    threshold is kept; method: a name of `offramp.names(offramp.Calibrator)`; risk: disagreement, accuracy_drop or
    excess_loss; options: of the policy, when it is a name, and of the method. Raises `BadArgument`, `UnknownName`.
    """
    check_levels(alpha, delta)
    find_risk(risk)
    if not len(trace):
        raise BadArgument("the trace has no rows to calibrate on; record one: offramp.record(model, data)")
    of_method = set(inspect.signature(lookup(Calibrator, method)).parameters)
    of_policy = options_of(policy)
    check_options(options, of_policy | of_method, f"calibrate with policy {policy!r} and method {method!r}")
    made = template(
        policy, trace.depths[:-1], trace.classes, **{k: v for k, v in options.items() if k in of_policy}
    )
    with_method = create(Calibrator, method, **{k: v for k, v in options.items() if k in of_method})
    found: Calibration = with_method.fit(trace, made, alpha=alpha, delta=delta, risk=risk)
    return found


def options_of(policy: str | ExitPolicy | Calibration | Mapping[str, Any]) -> set[str]:
    """Return the options that go with a policy: those of a name's class, none for anything else."""
    return set(inspect.signature(lookup(ExitPolicy, policy)).parameters) if isinstance(policy, str) else set()


def template(
    policy: str | ExitPolicy | Calibration | Mapping[str, Any], depths: Sequence[int], classes: int, **options: Any
) -> ExitPolicy:
    """Return the policy whose ladder is walked: a name at any threshold, anything else as `enable` takes it."""
    if not isinstance(policy, str):
        return make_policy(policy, depths, **options)
    check_options(options, options_of(policy), f"ExitPolicy {policy!r}")
    made: ExitPolicy = lookup(ExitPolicy, policy).example(depths, classes, **options)
    made.check(depths)
    return made


def check_levels(alpha: float, delta: float) -> None:
    """Raise `BadArgument` unless both are numbers between 0 and 1."""
    for name, value in (("alpha", alpha), ("delta", delta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise BadArgument(
                f"{name} must be a number between 0 and 1, both excluded, not {value!r}; e.g. {name}=0.05"
            )
