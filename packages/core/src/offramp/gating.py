"""Around gates: building one by name, finding the one that says a statistic, asking one at every exit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp._registry import lookup, names
from offramp.errors import BadArgument, NotAttached, UnknownName, check_options, did_you_mean
from offramp.gate import ExitGate
from offramp.kernels.confidence import confidence

if TYPE_CHECKING:
    from offramp.attach import Exits


def build_gate(given: str | Mapping[str, Any], width: int, exits: int) -> tuple[ExitGate, str, dict[str, Any]]:
    """Return (a fresh gate, its name, its options) for a name or {"gate": name, option: value}.

    Raises `BadArgument`, `UnknownName`.
    """
    config = {"gate": given} if isinstance(given, str) else given
    if not isinstance(config, Mapping) or not isinstance(config.get("gate"), str):
        raise BadArgument(
            f"gate={given!r} names no gate; give one of {', '.join(names(ExitGate))}, or with options "
            f'{{"gate": "lambda", "hidden": 64}}'
        )
    name, options = config["gate"], {k: v for k, v in config.items() if k != "gate"}
    if name not in names(ExitGate):
        raise UnknownName(f"no gate is called {name!r};{did_you_mean(name, names(ExitGate))}")
    cls = lookup(ExitGate, name)
    known = [n for n in inspect.signature(cls.build).parameters if n not in ("width", "exits")]
    check_options(options, known, f"gate {name!r}")
    return cls.build(width, exits, **options), name, options


def gate_of(statistic: str) -> str | None:
    """Return the name of the gate that says `statistic`, or None where no gate does."""
    return next((name for name in names(ExitGate) if lookup(ExitGate, name).statistic == statistic), None)


def need_gate(exits: Exits, name: str, trained: bool = False) -> None:
    """Raise `NotAttached` with the line to write unless the gate beside these exits is the one called `name`; with
    `trained`, also `BadArgument` unless it has been trained."""
    if exits.gate != name:
        have = "no gate" if exits.gate is None else f"gate {exits.gate!r}"
        raise NotAttached(
            f"these exits have {have}; attach one: offramp.attach(model, at={list(exits.at)}, head={exits.head!r}, "
            f'gate="{name}"), and train it: offramp.fit(model, data, loss="{lookup(ExitGate, name).loss}")'
        )
    if trained and not exits.gate_module.trained:
        raise BadArgument(
            f"gate {name!r} is untrained, so it says the same of every row; train it: "
            f'offramp.fit(model, data, loss="{lookup(ExitGate, name).loss}")'
        )


def ask(exits: Exits, hidden: Sequence[Tensor], predictions: Sequence[Tensor] | None = None) -> Tensor:
    """Return the gate's log-odds [rows, exits]; no gradient reaches states or predictions.

    hidden: one [rows, width] per exit; predictions: of the heads, [rows, classes], where they are known already.
    """
    gate, said, previous = exits.gate_module, [], None
    for index, (depth, state) in enumerate(zip(exits.at, hidden, strict=True)):
        stats: dict[str, Tensor] = {}
        if gate.needs:
            with torch.no_grad():
                stats = confidence(exits[depth](state) if predictions is None else predictions[index], gate.needs)
        said.append(gate.log_odds(state.detach(), index, previous, stats))
        previous = state.detach()
    return torch.stack(said, 1)
