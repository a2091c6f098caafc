"""Drive a policy over a trace as the engine drives it over rows: no model needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp._registry import lookup
from offramp.calibration import Calibration
from offramp.enable import check_outputs, make_policy
from offramp.errors import BadArgument
from offramp.gate import ExitGate
from offramp.gating import gate_of
from offramp.policy import ExitPolicy
from offramp.trace import Trace


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy would have done to the rows of a trace.

    depths: LongTensor [N] blocks run; columns: LongTensor [N] of the trace; labels: LongTensor [N] answers; depth_mean
    in blocks; cost_mean in the trace's unit; saved = 1 - cost_mean / full cost; agreement: share of rows that answer
    as the full model does, NaN for heads with one output, which have no classes; accuracy: share that is right among
    labelled rows, None without labels.
    """

    depths: Tensor
    columns: Tensor
    labels: Tensor
    depth_mean: float
    cost_mean: float
    saved: float
    agreement: float
    accuracy: float | None

    def __repr__(self) -> str:
        right = "" if self.accuracy is None else f", accuracy={self.accuracy:.4f}"
        return (
            f"Outcome(saved={self.saved:.4f}, agreement={self.agreement:.4f}{right}, depth_mean={self.depth_mean:.2f})"
        )


def simulate(trace: Trace, policy: str | ExitPolicy | Calibration | Mapping[str, Any], **options: Any) -> Outcome:
    """Drive a policy over a trace exactly as the live engine drives it over tensors, and return what comes out.

    policy: as for `enable`: an object, a calibration, a config, or a name with its `options`. Rows whose evidence is
    not finite never stop early. Raises `BadArgument` for an empty trace or a statistic the trace does not hold.
    """
    made = make_policy(policy, trace.depths[:-1], **options)
    if not len(trace):
        raise BadArgument("the trace has no rows, so nothing can be simulated; record one: offramp.record(model, data)")
    columns = exit_columns(trace, made)
    depths = torch.tensor(trace.depths)[columns]
    labels = trace.label.gather(1, columns.unsqueeze(1)).squeeze(1)
    costs = torch.as_tensor(trace.costs)
    cost = float(costs[columns].mean())
    accuracy, known = None, trace.labelled
    if known is not None and trace.targets is not None:
        accuracy = float((labels[known] == trace.targets[known]).double().mean())
    return Outcome(
        depths=depths,
        columns=columns,
        labels=labels,
        depth_mean=float(depths.double().mean()),
        cost_mean=cost,
        saved=1.0 - cost / float(costs[-1]),
        agreement=float((labels == trace.label[:, -1]).double().mean()) if trace.classes > 1 else math.nan,
        accuracy=accuracy,
    )


def exit_columns(trace: Trace, policy: ExitPolicy) -> Tensor:
    """Return the column [N] at which each row leaves; the state of a row leaves with it, as in the live engine."""
    check_holds(trace, policy)
    n, last = trace.label.shape[0], trace.label.shape[1] - 1
    columns = torch.full((n,), last)
    rows, state, needs = torch.arange(n), policy.start(n, "cpu"), policy.statistics()
    for column in range(last):
        seen = trace.evidence(column, rows if column else None, needs)
        stop, state = policy.step(state, seen)
        if "top1" in seen.stats:  # softmax makes every statistic of a row NaN at once, so one tells for all
            stop = stop & seen.stats["top1"].isfinite()
        columns[rows[stop]] = column
        rows, state = rows[~stop], {k: v[~stop] for k, v in state.items()}
        if not len(rows):
            break
    return columns


def check_holds(trace: Trace, policy: ExitPolicy) -> None:
    """Raise `BadArgument` when the policy looks at a statistic that the trace does not hold."""
    held = {*trace.stats, "label"} | ({"prediction"} if trace.logits is not None else set())
    if missing := policy.statistics() - held:
        fix = "offramp.record(model, data, logits=True)" if "prediction" in missing else "offramp.record(model, data)"
        if "gate" in missing:
            fix += ", with head='speculative' and gates trained by offramp.fit(model, data, loss='speculative_gate')"
        for name in filter(None, map(gate_of, sorted(missing))):
            loss = lookup(ExitGate, name).loss
            fix += f", with attach(..., gate={name!r}) and the gate trained by offramp.fit(model, data, loss={loss!r})"
        raise BadArgument(
            f"the trace does not hold {', '.join(sorted(missing))} (it has: {', '.join(sorted(held))}), which "
            f"{type(policy).__name__} looks at; record it again: {fix}"
        )
    check_outputs(policy, trace.classes)
