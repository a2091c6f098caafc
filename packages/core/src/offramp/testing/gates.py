"""The contract of a gate, as one call: `check_gate("name")` raises `ContractError` with what is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp._registry import lookup, names
from offramp.gate import ExitGate
from offramp.gating import build_gate
from offramp.kernels.confidence import PREDICTION, confidence
from offramp.loss import Loss
from offramp.testing import require

#: statistics that are no gate's
TAKEN = PREDICTION | {"cosine", "prediction", "gate"}


def check_gate(name: str, width: int = 6, exits: int = 3, rows: int = 8, **config: Any) -> None:
    """Raise `ContractError` unless the gate called `name` keeps every rule of `ExitGate`. config: its options.

    A statistic of its own and a loss that exists; finite log-odds [rows] in float32, for many rows and for none, in
    float32 and bfloat16; rows that do not depend on one another; gradients that reach its own weights and nothing it
    was given; weights that a state_dict carries over.
    """
    cls = lookup(ExitGate, name)
    require(cls.statistic not in TAKEN, cls, f"statistic {cls.statistic!r} is taken")
    same = [n for n in names(ExitGate) if n != name and lookup(ExitGate, n).statistic == cls.statistic]
    require(not same, cls, f"statistic {cls.statistic!r} is also that of {same}")
    require(cls.loss in names(Loss), cls, f"loss {cls.loss!r} is not one of {names(Loss)}")
    require(cls.needs <= PREDICTION, cls, f"needs {set(cls.needs - PREDICTION)}, which no prediction gives")
    gate = build_gate({"gate": name, **config}, width, exits)[0]
    require(not gate.trained, gate, f"{cls.zero!r} must be zero until it is trained")
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in gate.parameters():
            value.add_(torch.randn(value.shape, generator=make))
    require(gate.trained, gate, "must know that it has been trained")
    hidden = torch.randn(exits, rows, width, generator=make, requires_grad=True)
    _check_rows(gate, hidden.detach())
    _check_gradients(gate, hidden)
    other = build_gate({"gate": name, **config}, width, exits)[0]
    other.load_state_dict(gate.state_dict())
    require(torch.equal(_said(gate, hidden), _said(other, hidden)), gate, "its state_dict does not carry it over")


def _said(gate: ExitGate, hidden: Tensor) -> Tensor:
    """Return log-odds [exits, rows] for states [exits, rows, width], whose own values stand for the logits."""
    found, previous = [], None
    for index, state in enumerate(hidden):
        found.append(gate.log_odds(state, index, previous, confidence(state, gate.needs)))
        previous = state
    return torch.stack(found)


def _check_rows(gate: ExitGate, hidden: Tensor) -> None:
    exits, rows, _ = hidden.shape
    for dtype in (torch.bfloat16, torch.float32):
        said = _said(gate.to(dtype), hidden.to(dtype))
        right = said.shape == (exits, rows) and said.dtype == torch.float32 and bool(said.isfinite().all())
        require(right, gate, f"log-odds must be [rows] finite numbers in float32, not {said.dtype} {list(said.shape)}")
    none = _said(gate, hidden[:, :0])
    require(none.shape == (exits, 0), gate, f"log-odds of no rows must be [0], not {list(none.shape)}")
    alone = torch.cat([_said(gate, hidden[:, i : i + 1]) for i in range(rows)], 1)
    require(torch.allclose(said, alone, atol=1e-5), gate, "rows depend on one another")
    chance = gate(hidden[0], 0, None, confidence(hidden[0], gate.needs))
    require(torch.allclose(chance, said[0].sigmoid()), gate, "forward must be the sigmoid of log_odds")


def _check_gradients(gate: ExitGate, hidden: Tensor) -> None:
    with torch.enable_grad():
        own = list(gate.parameters())
        found = torch.autograd.grad(_said(gate, hidden).square().sum(), [*own, hidden], allow_unused=True)
    require(found[-1] is None, gate, "gradient reaches what it was given; detach it")
    require(all(g is not None for g in found[:-1]), gate, "some of its weights get no gradient")
