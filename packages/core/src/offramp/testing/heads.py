"""The contract of an exit head, as one call: `check_head("name")` raises `ContractError` with what is wrong."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from offramp.attach import Exits, attach
from offramp.backbone import Tap
from offramp.errors import BadArgument
from offramp.fit import trainable
from offramp.head import Around, ask_in_turn
from offramp.testing import ContractError
from offramp.testing.toy import ToyModel, toy_plugin


def check_head(name: str, model: nn.Module | None = None, **config: Any) -> None:
    """Attach the head called `name` to `model` (default: a `ToyModel`) and check what every head promises.

    Untrained it is the backbone's own readout, unless config has init="random"; it keeps leading dimensions; the
    backbone's `state_dict` keys and weights stay; its own state is complete, separate from the backbone and survives a
    round trip; what `fit` would train gets a gradient and is saved; cut to some
    classes it says the same of them. config: the head's options. Raises `ContractError`.
    """
    with toy_plugin() if model is None else nullcontext():
        model = ToyModel() if model is None else model
        model.eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with attach(model, [1, 2], name, **config) as exits:
            _readout(exits, lens=type(exits[1]).lens and config.get("init") != "random")
            _backbone_untouched(exits, before)
            if type(exits[1]).own:
                _round_trip(exits)
                _gradient(exits)
            elif exits[1].own_state() or trainable(exits):
                raise ContractError(f"head {name!r}: says own = False and has weights of its own")
            _narrowed(exits)
        if list(model.state_dict()) != list(before):
            raise ContractError(f"head {name!r}: detach() leaves other state_dict keys than the model had")


def _states(exits: Exits, *lead: int) -> torch.Tensor:
    base = next(p for p in exits.model.parameters() if p.is_floating_point())
    if exits.whole:
        state = torch.randn(*lead, *_shape(exits.backbone.taps()[0]), generator=torch.Generator().manual_seed(0))
        return exits[1].reduce(state.to(base))
    width = exits.backbone.context().width
    return torch.randn(*lead, width, generator=torch.Generator().manual_seed(0)).to(base)


def _shape(tap: Tap) -> tuple[int, ...]:
    """Return the shape of the state of one row at a tap of an image."""
    sizes = {"token": tap.prefix + math.prod(tap.grid), "width": tap.width, "channel": tap.width}
    sizes |= dict(zip(("height", "width" if "channel" in tap.layout else ""), tap.grid, strict=True))
    return tuple(sizes[axis] for axis in tap.layout.split()[1:])


@torch.no_grad()
def _readout(exits: Exits, lens: bool) -> None:
    context = exits.backbone.context()
    for lead in ((3,), (1,), (0,)) if exits.whole else ((3,), (1,), (0,), (2, 3)):
        hidden = _states(exits, *lead)
        out = exits[1](_mixed(exits, 1, hidden))
        if out.shape != (*lead, context.classes):
            raise ContractError(
                f"head {exits.head!r}: {tuple(hidden.shape)} gives {tuple(out.shape)}, not {(*lead, context.classes)}"
            )
        if lens and not torch.allclose(out, wanted := context.readout(hidden), rtol=1e-4, atol=1e-5):
            raise ContractError(
                f"head {exits.head!r}: untrained it is not the backbone's own readout (off by "
                f"{(out - wanted).abs().max():g}); start its norm and projection from `base`, and added maps from zero"
            )


def _backbone_untouched(exits: Exits, before: dict[str, torch.Tensor]) -> None:
    after = exits.model.state_dict()
    odd = [k for k in after if k not in before and not k.startswith("exits.")]
    gone = [k for k in before if k not in after]
    if odd or gone:
        raise ContractError(f"head {exits.head!r}: attach changed the backbone's state_dict keys: {(odd + gone)[:4]}")
    for key, value in before.items():
        if not torch.equal(after[key], value):
            raise ContractError(f"head {exits.head!r}: attach changed the backbone's weight {key}")


@torch.no_grad()
def _round_trip(exits: Exits) -> None:
    one, two = exits[1].own_state(), exits[2].own_state()
    if not one:
        raise ContractError(f"head {exits.head!r}: own_state() is empty, so nothing of it would be saved")
    backbone = {v.data_ptr() for k, v in exits.model.state_dict().items() if not k.startswith("exits.")}
    shared = [k for k, v in one.items() if v.numel() and v.data_ptr() in backbone]
    if shared:
        raise ContractError(f"head {exits.head!r}: own_state() holds the backbone's weights: {shared[:4]}")
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in two.items()}:
        raise ContractError(f"head {exits.head!r}: two heads of one width have different own_state()")
    for value in one.values():
        value.data.copy_(torch.rand(value.shape).to(value))  # positive: a variance among them stays one
    hidden = _states(exits, 4)
    if torch.equal(_says(exits, 1, hidden), _says(exits, 2, hidden)):
        raise ContractError(f"head {exits.head!r}: its own_state() does not change what it says")
    for key, value in two.items():
        value.data.copy_(one[key])
    if not torch.equal(_says(exits, 1, hidden), _says(exits, 2, hidden)):
        raise ContractError(f"head {exits.head!r}: a head with the own_state() of another says something else")


@torch.no_grad()
def _narrowed(exits: Exits) -> None:
    """Check that a head cut to some classes says what it says of them, or refuses."""
    classes = exits.backbone.context().classes
    ids = torch.arange(classes - 1, -1, -2)
    try:
        short = exits[1].narrowed(ids)
    except BadArgument:
        return
    hidden = _mixed(exits, 1, _states(exits, 3))
    if not torch.allclose(short(hidden), exits[1](hidden)[..., ids], rtol=1e-4, atol=1e-5):
        raise ContractError(f"head {exits.head!r}: narrowed(ids) says something else of these classes than the head")


def _mixed(exits: Exits, depth: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return states [..., width] as a head reads them: for one that mixes, as texts along the last dimension but one.
    """
    head = exits[depth]
    if not type(head).mixes or not hidden.numel():
        return hidden
    texts = hidden.reshape(-1, *hidden.shape[-2:])
    return head.mix(texts, Around(torch.arange(texts.shape[1])[None])).reshape(hidden.shape)


def _says(exits: Exits, depth: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the prediction of a head, and where it has a gate beside it, what that says when asked alone."""
    out: torch.Tensor = exits[depth](_mixed(exits, depth, hidden))
    if type(exits[depth]).gates:
        said = ask_in_turn([exits[depth]], [hidden], out)[0][0]
        out = torch.cat([out, said.unsqueeze(-1)], -1)
    return out


def _gradient(exits: Exits) -> None:
    own = {id(v) for depth in exits for v in exits[depth].own_state().values()}
    wanted = trainable(exits)
    if not wanted or {id(p) for p in wanted} - own:
        raise ContractError(f"head {exits.head!r}: fit would train nothing, or weights that own_state() does not save")
    flags = {p: p.requires_grad for p in exits.model.parameters()}
    try:
        for p in flags:
            p.requires_grad_(any(p is w for w in wanted))
        with torch.enable_grad():
            hidden = _states(exits, 4)
            out = sum(_says(exits, depth, hidden).square().mean() for depth in exits)
            if not isinstance(out, torch.Tensor) or not out.requires_grad:
                raise ContractError(f"head {exits.head!r}: none of its own weights gets a gradient")
            found = torch.autograd.grad(out, wanted, allow_unused=True)
        if any(g is None for g in found):
            raise ContractError(f"head {exits.head!r}: some of its own weights get no gradient")
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
