"""Risks: what leaving early costs one row, in [0, 1]; a calibration promises a bound on its expectation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.calibrator import Losses
from offramp.errors import BadArgument, UnknownName, did_you_mean
from offramp.trace import UNLABELLED, Trace


class Risk(NamedTuple):
    """A per-row loss: `of(trace, columns [N])` gives [n] in [0, 1], for labelled rows only where labels are needed.

    binary: whether it is only ever 0 or 1, so that the exact binomial test applies; labelled: whether rows without a
    label are left out.
    """

    of: Callable[[Trace, Tensor], Tensor]
    binary: bool
    labelled: bool


def disagreement(trace: Trace, columns: Tensor) -> Tensor:
    """Return 1 for each row whose early answer is not the full model's, else 0."""
    return (_at(trace.label, columns) != trace.label[:, -1]).double()


def accuracy_drop(trace: Trace, columns: Tensor) -> Tensor:
    """Return 1 for each labelled row that the full model answers right and the early exit wrong, else 0."""
    if trace.targets is None:
        raise BadArgument('risk "accuracy_drop" needs labels, and the trace has none; record data with its labels')
    full, early = trace.label[:, -1] == trace.targets, _at(trace.label, columns) == trace.targets
    return (full & ~early).double()[trace.targets != UNLABELLED]


def excess_loss(trace: Trace, columns: Tensor) -> Tensor:
    """Return the task loss at the exit minus that of the full model, clipped to [0, 1] row by row; NaN counts as 1."""
    if trace.losses is None:
        raise BadArgument('risk "excess_loss" needs task losses, and the trace has none; record data with its labels')
    excess = (_at(trace.losses, columns) - trace.losses[:, -1]).double().nan_to_num(nan=1.0).clamp(0.0, 1.0)
    stayed = columns == len(trace.depths) - 1
    excess = torch.where(stayed, 0.0, excess)  # also where the full model's own loss is NaN or infinite
    return excess if trace.targets is None else excess[trace.targets != UNLABELLED]


RISKS = {
    "disagreement": Risk(disagreement, True, False),
    "accuracy_drop": Risk(accuracy_drop, True, True),
    "excess_loss": Risk(excess_loss, False, True),
}


def find_risk(name: str) -> Risk:
    """Return the risk called `name`; raises `UnknownName` with those that exist."""
    if name not in RISKS:
        raise UnknownName(f"no risk is called {name!r};{did_you_mean(name, RISKS)}")
    return RISKS[name]


def counted(trace: Trace, risk: str) -> Tensor | None:
    """Return the mask [N] of the rows that a risk counts, None for all of them: what `losses` has one value for."""
    return trace.targets != UNLABELLED if find_risk(risk).labelled and trace.targets is not None else None


def losses(trace: Trace, columns: Tensor, risk: str) -> Losses:
    """Return the per-row losses [n] in [0, 1] of leaving at `columns` [N]."""
    found: Losses = find_risk(risk).of(trace, columns).numpy()
    return found


def table(trace: Trace, risk: str, columns: int) -> tuple[Losses, Losses]:
    """Return (the losses [columns, n] of leaving at each of the first columns, the mask [N] of the n rows that count).

    Raises `BadArgument` where no row counts.
    """
    rows = counted(trace, risk)
    mask: Losses = np.ones(len(trace), bool) if rows is None else rows.numpy()
    if not mask.any():
        raise BadArgument("no row of the trace has a label, so this risk cannot be measured; record data with labels")
    return np.stack([losses(trace, torch.full((len(trace),), k), risk) for k in range(columns)]), mask


def _at(table: Tensor, columns: Tensor) -> Tensor:
    return table.gather(1, columns.unsqueeze(1)).squeeze(1)
