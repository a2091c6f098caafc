"""The contract of an exit head: a module from the hidden state at a tap to a prediction."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from offramp.backbone import Tap
from offramp.errors import BadArgument

if TYPE_CHECKING:
    from pathlib import Path

    from offramp.attach import Exits


@dataclass(frozen=True)
class HeadContext:
    """The backbone's own way from its last hidden state to its prediction: what a head starts from.

    norm: module before the projection (final norm, pooler); heads copy it. projection: the unembedding or classifier,
    shared with the backbone, never copied or trained through. finish: soft cap or scale after it. width: of the hidden
    state; classes: of the prediction. block: the last block, for heads that copy one.
    """

    norm: nn.Module
    projection: nn.Module
    finish: Callable[[Tensor], Tensor]
    width: int
    classes: int
    block: nn.Module | None = None

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the backbone's own prediction for a last hidden state [..., width] -> [..., classes]."""
        out: Tensor = self.finish(self.projection(self.norm(hidden)))
        return out


@dataclass(frozen=True)
class Around:
    """What surrounds the states that a head mixes.

    positions: int64 [batch or 1, new]; mask: [batch, past + new] of 0/1 over all of them, None when nothing is padding,
    or bool [batch, new, past + new], which of them each new one sees; past: where keys and values of earlier states are
    kept (`update(keys, values)` returns all of them), None when there are none; call: runs a copy of the model's last
    block on the states as the model would, None where the backbone cannot.
    """

    positions: Tensor
    mask: Tensor | None = None
    past: Any = None
    call: Callable[[nn.Module, Tensor], Tensor] | None = None


class ExitHead(nn.Module):
    """Maps the hidden state at a tap to a prediction of the same shape as the backbone's own."""

    #: names in `own_state` that start so are in the files of `save_extra`, not in `exits.safetensors`
    extra: ClassVar[tuple[str, ...]] = ()
    #: whether the head has weights of its own; one without is trained only by training the backbone
    own: ClassVar[bool] = True
    #: whether the head, untrained, is the backbone's own readout of the state (the logit lens)
    lens: ClassVar[bool] = True
    #: names in `own_state` that start so are a gate's: they act on `gate(...)`, not on the prediction
    gates: ClassVar[tuple[str, ...]] = ()
    #: whether the head reads earlier states too: `mix` then runs before `forward`, and remembers
    mixes: ClassVar[bool] = False
    #: whether the head reads the whole state at its tap, of any width, and not what the model's own readout pools
    whole: ClassVar[bool] = False
    #: whether the head reads states of any width, and not what the model's own readout takes
    any_width: ClassVar[bool] = False
    #: whether it must be in train mode while it is trained, and in eval mode when it answers (batch norm)
    modal: ClassVar[bool] = False
    #: whether what the head reads comes out of weights that are trained with it, so that the model runs in every step
    live: ClassVar[bool] = False

    def reduce(self, hidden: Tensor) -> Tensor:
        """Return what weights of the head act on, of a whole state [batch, ...]: whatever else need not be kept."""
        return hidden

    def mix(self, hidden: Tensor, around: Around) -> Tensor:
        """Return states [batch, new, width] that have seen the earlier ones; only of heads with `mixes`."""
        return hidden

    def features(self, hidden: Tensor) -> Tensor | None:
        """Return what goes into the shared projection [..., width], so that several heads can be projected at once;
        None for a head with a projection of its own."""
        return None

    @classmethod
    @abstractmethod
    def build(cls, tap: Tap, base: HeadContext, *args: Any, **config: Any) -> ExitHead:
        """Build the head for one tap; untrained, it must be the backbone's own readout of that state (logit lens),
        unless its option init="random" asks for another start."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to a prediction [..., classes]."""

    def narrowed(self, ids: Tensor) -> ExitHead:
        """Return this head for the classes `ids` only, [..., width] -> [..., len(ids)]: all modules but the projection
        are shared, of which it holds its rows as they are at each `refresh()` of its `Rows`. Raises `BadArgument`.
        """
        base: HeadContext | None = self.__dict__.get("base")
        if base is None:
            raise BadArgument(f"{type(self).__name__} has no projection that could be cut to a draft_vocabulary")
        rows = Rows(base.projection, ids)
        other = self.sharing(rows=rows)
        other.share(replace(base, projection=rows, classes=len(ids)))
        return other

    def sharing(self, **modules: nn.Module) -> ExitHead:
        """Return a copy of this head with the same modules, but for those given."""
        other = copy.copy(self)
        other.__dict__["_modules"] = {**self._modules, **modules}
        return other

    def own_state(self) -> dict[str, Tensor]:
        """Return the tensors to save, by name: what belongs to the head and not to the backbone."""
        return dict(self.state_dict(keep_vars=True))

    @classmethod
    def attached(cls, exits: Exits) -> Callable[[], None] | None:
        """Act once when all heads are on the model (e.g. let PEFT wrap them); return the undo."""
        return None

    @classmethod
    def save_extra(cls, exits: Exits, folder: Path) -> list[str]:
        """Write files beside `exits.safetensors` and return their names."""
        return []

    @classmethod
    def load_extra(cls, exits: Exits, folder: Path) -> None:
        """Read what `save_extra` wrote."""

    def share(self, base: HeadContext) -> None:
        """Keep the backbone's projection without registering it: it stays the backbone's, also in `state_dict`."""
        self.__dict__["base"] = base

    def unembed(self, features: Tensor) -> Tensor:
        """Read normed features [..., width] with the shared projection: [..., classes]."""
        base: HeadContext = self.__dict__["base"]
        return base.finish(base.projection(features))


class Rows(nn.Module):
    """Some rows of a projection: [..., width] -> [..., len(ids)].

    source: a module with `weight` [classes, width] and maybe `bias`, or with `rows(ids)` that returns such rows; raises
    `BadArgument` for others. Its weights are copied, now and at `refresh`: a quarter of the rows reads a quarter of the
    memory, which is what a projection of one state costs.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, source: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.__dict__["source"] = source
        weight = getattr(source, "weight", None)
        if not hasattr(source, "rows") and not (isinstance(weight, Tensor) and weight.dim() == 2):
            raise BadArgument(
                f"draft_vocabulary takes rows of an unembedding [classes, width], and {type(source).__name__} has "
                f"none; leave it out"
            )
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.refresh()

    def refresh(self) -> None:
        """Copy the rows again: the source may have been trained."""
        source: Any = self.__dict__["source"]
        with torch.inference_mode(False), torch.no_grad():
            bias = getattr(source, "bias", None)
            self.weight = source.rows(self.ids) if hasattr(source, "rows") else source.weight[self.ids]
            self.bias = None if bias is None else bias[self.ids]

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores of the classes."""
        return nn.functional.linear(features, self.weight, self.bias)


def gated(exits: Exits, trained: bool = False) -> list[Any]:
    """Return the heads, all with a gate; raises `BadArgument` when they have none, or with `trained` none trained."""
    heads: list[Any] = [exits[depth] for depth in exits.at]
    if not type(heads[0]).gates:
        raise BadArgument(
            f"heads {exits.head!r} have no gates to ask; attach some that do: "
            f"offramp.attach(model, at={list(exits.at)}, head='speculative')"
        )
    raw = [depth for depth, head in zip(exits.at, heads, strict=True) if trained and not head.trained]
    if raw:
        raise BadArgument(
            f"the gates at {raw} are untrained; train them all: offramp.fit(model, ids, loss='speculative_gate')"
        )
    return heads


def ask_in_turn(heads: Sequence[Any], hidden: Sequence[Tensor], first: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return (the gate's logit [rows] of every exit, asked one after the other; candidates [rows, k]).

    hidden: one [rows, width] per exit; first: the first head's prediction [rows, classes].
    """
    carried = heads[0].draft(hidden[0], first)
    p, logits = carried["p"], []
    for head, state in zip(heads, hidden, strict=True):
        logit, p = head.gate(state, carried["candidates"], p)
        logits.append(logit)
    return logits, carried["candidates"]
