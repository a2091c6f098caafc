"""From a trace and a bound on the risk to a policy with thresholds and, where it can be given, a certificate."""

from __future__ import annotations

import dataclasses
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
from offramp.trace import UNLABELLED, Trace


def calibrate(
    trace: Trace,
    policy: str | ExitPolicy | Calibration | Mapping[str, Any],
    *,
    method: str = "fixed_sequence",
    risk: str | None = None,
    alpha: float = 0.05,
    delta: float = 0.05,
    **options: Any,
) -> Calibration:
    """Choose thresholds for a policy on a trace so that the risk is at most alpha with confidence 1 - delta.

    policy: a name (its threshold is what is looked for) or an object, calibration or config, of which all but the
    threshold is kept; method: a name of `offramp.names(offramp.Calibrator)`; risk: disagreement, accuracy_drop or
    excess_loss, None for the method's own; options: of the policy, when it is a name, and of the method. Raises
    `BadArgument`, also for rows that are not finite or all of one class, and `UnknownName`.
    """
    check_levels(alpha, delta)
    kind = lookup(Calibrator, method)
    chosen = choose_risk(kind, method, risk)
    if not len(trace):
        raise BadArgument("the trace has no rows to calibrate on; record one: offramp.record(model, data)")
    of_method = set(inspect.signature(kind).parameters)
    of_policy = options_of(policy)
    check_options(options, of_policy | of_method, f"calibrate with policy {policy!r} and method {method!r}")
    its = {k: v for k, v in options.items() if k in of_policy}
    exits = trace.depths[:-1]
    made = make_policy(policy, exits, **its) if kind.keeps else template(policy, exits, trace.classes, **its)
    check_rows(trace, made, chosen)
    with_method = create(Calibrator, method, **{k: v for k, v in options.items() if k in of_method})
    found: Calibration = with_method.fit(trace, made, alpha=alpha, delta=delta, risk=chosen)
    return dataclasses.replace(found, model_hash=trace.model_hash)


def choose_risk(kind: type[Calibrator], method: str, risk: str | None) -> str:
    """Return the risk asked for, or the method's own; raises `BadArgument` where the method bounds only that one."""
    if risk is None or risk == kind.risk:
        return kind.risk
    if kind.own_risk:
        raise BadArgument(f"method {method!r} bounds {kind.risk!r} and no other risk, not {risk!r}; leave risk out")
    find_risk(risk)
    return risk


def check_rows(trace: Trace, policy: ExitPolicy, risk: str) -> None:
    """Raise `BadArgument` for rows that no promise could be made from: not finite, or all of one class.

    Heads that predict a number have one output and no classes, and only losses say how right they are.
    """
    finite = trace.finite(policy.statistics())
    if not bool(finite.all()):
        odd = (~finite).nonzero().squeeze(-1)
        raise BadArgument(
            f"{len(odd)} of {len(trace)} rows of the trace are not finite (the first is row {int(odd[0])}): the model "
            f"or a head gave NaN there. Mend it, or leave them out, and promise nothing for such rows: "
            f"trace = trace[trace.finite()]"
        )
    if trace.classes < 2 and risk != "excess_loss":
        raise BadArgument(
            f"the trace has {trace.classes} class, so no exit ever differs and {risk!r} is always 0; for heads that "
            f"predict a number use risk='excess_loss'"
        )
    known = None if trace.targets is None else trace.targets[trace.targets != UNLABELLED]
    if known is not None and len(known) > 1 and bool((known == known[0]).all()):
        raise BadArgument(
            f"all {len(known)} labelled rows of the trace are of class {int(known[0])}, one of {trace.classes}: they "
            f"say nothing about the others. Shuffle the data before you record a part of it"
        )


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
