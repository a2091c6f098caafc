"""Attach exit heads to a model, find them again, and take them off exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from offramp import checkpoint
from offramp._plugins import adapt, part, plugins
from offramp._registry import lookup
from offramp.backbone import Backbone, Observed, Tap
from offramp.errors import BadArgument, DamagedFile, NotAttached, check_options
from offramp.gate import ExitGate
from offramp.gating import ask, build_gate, need_gate
from offramp.head import ExitHead

#: where the heads live on the model, so that `.to()`, optimisers and PEFT see them, and where the record of them lives
MODULE, RECORD = "exits", "_offramp_exits"
#: where the gate lives among the heads
GATE = "gate"


class Exits:
    """The heads attached to one model; a context manager that detaches on leaving."""

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        at: Sequence[int],
        head: str,
        config: dict[str, Any],
        gate: str | None = None,
        gate_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.backbone, self.head, self.config = model, backbone, head, dict(config)
        #: name of the gate beside the exits, or None, and its options
        self.gate, self.gate_config = gate, dict(gate_config or {})
        #: depths of the exits, shallow first
        self.at: tuple[int, ...] = tuple(at)
        self._undo: Callable[[], None] | None = None

    @property
    def modules(self) -> nn.ModuleDict:
        """The heads by depth, and the gate if there is one, as they stand on the model."""
        found = self.model.__dict__["_modules"].get(MODULE)
        if self.model.__dict__.get(RECORD) is not self or found is None:
            raise NotAttached("these exits are detached; attach again: offramp.attach(model, at=[...])")
        return found  # type: ignore[no-any-return]

    @property
    def gate_module(self) -> ExitGate:
        """The gate beside the exits; raises `NotAttached` with the line to write when there is none."""
        if self.gate is None:
            need_gate(self, "linear")
        return self.modules[GATE]  # type: ignore[return-value]

    def odds(self, hidden: Sequence[Tensor], predictions: Sequence[Tensor] | None = None) -> Tensor:
        """Return the gate's log-odds [rows, exits]; see `offramp.gating.ask`."""
        return ask(self, hidden, predictions)

    def __getitem__(self, depth: int) -> ExitHead:
        """Return the head at `depth`; raises `BadArgument` naming the depths that have one."""
        if depth not in self.at:
            raise BadArgument(f"no exit at depth {depth}; exits are at {list(self.at)}")
        return self.modules[str(depth)]  # type: ignore[return-value]

    @property
    def mixes(self) -> bool:
        """Whether the heads read earlier states of a sequence too."""
        return bool(self.at) and type(self[self.at[0]]).mixes

    @property
    def whole(self) -> bool:
        """Whether the heads read the whole state at their tap."""
        return bool(self.at) and type(self[self.at[0]]).whole

    @property
    def live(self) -> bool:
        """Whether what the heads read is trained with them."""
        return bool(self.at) and type(self[self.at[0]]).live

    def observe(self, batch: Any, more: Sequence[int] = (), deepest: bool = False) -> Observed:
        """Run the full model on one batch and return what the heads need to see of it.

        more: further depths whose states are wanted; those of all depths are then in `states`. deepest: keep the whole
        state after the last block too, as `last`.
        """
        depths = sorted({*self.at, *more, *([self.backbone.depth] if deepest else [])})
        entire = self.mixes or self.whole or deepest
        seen = self.backbone.observe(batch, depths, whole=True) if entire else self.backbone.observe(batch, depths)
        if deepest:
            seen.last = seen.whole.pop()
            seen.hidden.pop()
            depths.pop()
        if more:
            seen.states = {**dict(zip(depths, seen.hidden, strict=True)), self.backbone.depth: seen.final}
            mine = [depths.index(d) for d in self.at]
            seen.hidden = [seen.hidden[i] for i in mine]
            seen.whole = [seen.whole[i] for i in mine] if entire else seen.whole
        if self.whole:
            seen.hidden = [self[d].reduce(state) for d, state in zip(self.at, seen.whole, strict=True)]
            seen.whole = []
        return seen

    def inputs(self, seen: Observed, active: Sequence[int] | None = None) -> list[Tensor]:
        """Return what goes into the heads [rows, width], one per exit of `active` (indices; None: all)."""
        which = range(len(self.at)) if active is None else active
        if not self.mixes:
            return [seen.hidden[i] for i in which]
        if seen.around is None or seen.keep is None:
            raise BadArgument(f"heads {self.head!r} read whole sequences: observe(batch, depths, whole=True)")
        return [self[self.at[i]].mix(seen.whole[i], seen.around)[seen.keep] for i in which]

    def __iter__(self) -> Iterator[int]:
        return iter(self.at)

    def __len__(self) -> int:
        return len(self.at)

    def __repr__(self) -> str:
        gate = "" if self.gate is None else f", gate={self.gate!r}"
        return f"Exits({type(self.model).__name__}, at={list(self.at)}, head={self.head!r}{gate})"

    def save(self, directory: str | Path) -> None:
        """Write the exits directory: `exits.json`, weights in safetensors, and a PEFT adapter for LoRA heads."""
        checkpoint.save(self, directory)

    def detach(self) -> None:
        """Take the heads off; disables a running policy first. Afterwards the model is exactly as before `attach`."""
        if self.model.__dict__.get(RECORD) is not self:
            return
        run = self.model.__dict__.get("_offramp_run")
        if run is not None:
            run.disable()
        if self._undo is not None:
            self._undo()
        self.model.__dict__["_modules"].pop(MODULE, None)
        self.model.__dict__.pop(RECORD, None)

    def __enter__(self) -> Exits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def depths_from(at: int | float | Sequence[int | float], depth: int) -> tuple[int, ...]:
    """Turn taps (ints, or fractions of the depth) into sorted depths; raises `BadArgument` outside 1 .. depth-1."""
    wanted = list(at) if isinstance(at, (list, tuple, range)) else [at]
    if not wanted:
        raise BadArgument(f"at=[] names no tap; this model has taps 1 to {depth - 1}, e.g. at=[{max(1, depth // 2)}]")
    found = []
    for tap in wanted:
        if isinstance(tap, bool) or not isinstance(tap, (int, float)):
            raise BadArgument(f"tap {tap!r} is neither a number of blocks nor a fraction of the depth")
        k = round(tap * depth) if isinstance(tap, float) and 0 < tap < 1 else tap
        if not 1 <= k < depth or k != int(k):  # in this order: int() of NaN raises
            raise BadArgument(
                f"tap {tap} is outside the model: it has {depth} blocks, so an exit can be at 1 to {depth - 1} "
                f"(or a fraction between 0 and 1); depth {depth} is the full model"
            )
        found.append(int(k))
    if len(set(found)) != len(found):
        raise BadArgument(f"at={wanted} names a depth twice ({sorted(found)})")
    return tuple(sorted(found))


def attach(
    model: nn.Module,
    at: int | float | Sequence[int | float],
    head: str = "tied",
    *,
    gate: str | Mapping[str, Any] | None = None,
    **config: Any,
) -> Exits:
    """Attach one head per tap; the base weights are untouched and nothing is enabled.

    at: depths (1 .. depth-1) or fractions of the depth. head: a name of `offramp.names(offramp.ExitHead)`; config:
    its options. gate: a name of `offramp.names(offramp.ExitGate)`, or {"gate": name, option: value}, for a gate beside
    them. Heads and gate live at `model.exits`. Raises `UnsupportedModel`, `BadArgument`, `UnknownName`, `NotAttached`
    (already attached) and leaves the model unchanged then.
    """
    model = part(model)
    if RECORD in model.__dict__:
        raise NotAttached(
            f"{type(model).__name__} already has exits at {list(find(model).at)}; first: exits.detach(), or "
            f"from offramp.attach import find; find(model).detach()"
        )
    if hasattr(model, MODULE):
        raise NotAttached(
            f"{type(model).__name__} already has an attribute {MODULE!r} of its own; exits need that name"
        )
    backbone = adapt(model)
    depths = depths_from(at, backbone.depth)
    cls = lookup(ExitHead, head)
    known = [n for n in inspect.signature(cls.build).parameters if n not in ("tap", "base", "at")]
    check_options(config, known, f"head {head!r}")
    if cls.mixes and not backbone.sequences:
        raise BadArgument(
            f"head {head!r} reads the earlier states of a text, and {type(model).__name__} is no decoder of one; "
            f"use head='translator'"
        )
    if gate is not None and cls.mixes:
        raise BadArgument(
            f"gate={gate!r} judges a state by itself, and head {head!r} answers from earlier ones too; leave gate out"
        )
    context, taps = backbone.context(), backbone.taps()
    _fits(cls, head, [taps[k - 1] for k in depths], context.width, gate)
    opener, named, options = (None, None, {}) if gate is None else build_gate(gate, context.width, len(depths))
    place = {"at": depths} if "at" in inspect.signature(cls.build).parameters else {}  # of one that differs by exit
    heads = nn.ModuleDict({str(k): cls.build(taps[k - 1], context, **config, **place) for k in depths})
    heads.train(model.training)
    _like(heads, model)
    exits = Exits(model, backbone, depths, head, config, named, options)
    model.add_module(MODULE, heads)
    model.__dict__[RECORD] = exits
    try:
        exits._undo = cls.attached(exits)
        if opener is not None:  # after the heads' own doings: whatever wraps them (PEFT) has no business with it
            heads[GATE] = _like(opener.train(model.training), model)
    except BaseException:
        exits.detach()
        raise
    return exits


def _fits(cls: type[ExitHead], head: str, taps: Sequence[Tap], width: int, gate: Any) -> None:
    """Raise `BadArgument` for a head or a gate that reads states of one width, at taps of others."""
    odd = {tap.depth: tap.width for tap in taps if tap.width != width}
    if odd and not (cls.whole or cls.any_width):
        raise BadArgument(
            f"head {head!r} starts from the model's own readout, which takes a width of {width}; the states at depths "
            f"{list(odd)} have {sorted(set(odd.values()))}: use a head with a readout of its own, head='pooled_linear'"
        )
    if gate is not None and (odd or cls.whole):
        raise BadArgument(f"gate={gate!r} reads pooled states of one width, and here states differ; leave it out")


def _like(made: nn.Module, model: nn.Module) -> nn.Module:
    """Move freshly made weights to the model's device and floating type."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return made.to(device=first.device, dtype=first.dtype)


def find(model: nn.Module, needed: bool = True) -> Exits:
    """Return the exits on `model`; without any, raises `NotAttached` with the line to write, or, where none are
    `needed`, returns `Exits` at no depth.
    """
    model = part(model)
    exits = model.__dict__.get(RECORD)
    if exits is None and not needed:
        return Exits(model, adapt(model), (), "", {})
    if exits is None:
        raise NotAttached(
            f"{type(model).__name__} has no exits attached; first: offramp.attach(model, at=[...]) or "
            f"offramp.load(model, directory)"
        )
    return exits  # type: ignore[no-any-return]


def load(model: nn.Module, source: str | Path) -> Exits:
    """Attach the exits that `exits.save(directory)` wrote; `source` is a directory or a model-hub id.

    Checks format, digests, architecture, depth, width, vocabulary and every shape first; raises `DamagedFile` and
    leaves the model unchanged when anything differs.
    """
    model, folder = part(model), Path(source)
    if not folder.exists():
        folder = _download(str(source))
    body = checkpoint.read_index(folder)
    if RECORD not in model.__dict__:
        checkpoint.check_model(body, adapt(model).fingerprint(), folder)
    gate = None if body.get("gate") is None else {"gate": body["gate"], **body.get("gate_config", {})}
    exits = attach(model, body["at"], body["head"], gate=gate, **body["config"])
    try:
        checkpoint.restore(exits, folder)
    except BaseException:
        exits.detach()
        raise
    return exits


def _download(name: str) -> Path:
    try:
        found = plugins().manager.hook.offramp_fetch(source=name)
    except Exception as error:  # no hub, no network, no such id: one answer
        raise DamagedFile(f"{name!r} is neither a directory nor a hub id that can be fetched: {error}") from error
    if not found:
        raise DamagedFile(f"{name!r} is not a directory, and no plugin can fetch it from a hub: pip install offramp-hf")
    return Path(found[0])
