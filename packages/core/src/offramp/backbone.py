"""The contract of a backbone: the user's model seen as a chain of blocks with taps between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from offramp.errors import BadArgument

if TYPE_CHECKING:
    from offramp.blocks import Chain
    from offramp.enable import Run
    from offramp.head import Around, HeadContext

Undo = Callable[[], None]


class Tap(NamedTuple):
    """A block boundary, as data: enough to build a head without running the model.

    name: of the block before it; depth: blocks run when it is reached (1 .. depth); width: of the hidden state; layout:
    axes of the hidden state, e.g. "batch token width". Of images also: reduction: pixels per place along one side;
    prefix: tokens before those of the image (class token, registers); grid: places (rows, columns) of the image.
    """

    name: str
    depth: int
    width: int
    layout: str
    reduction: int = 0
    prefix: int = 0
    grid: tuple[int, ...] = ()


@dataclass
class Observed:
    """What every tap and the full model said about one batch, flattened to independent rows.

    hidden: one [rows, width] per tap asked for; final: the last hidden state [rows, width], before the readout;
    targets: [rows] labels or None; position: [rows] place in the sequence or None; sample: [rows] which input row it
    came from; last: the whole state after the last block [rows, ...], where a loss wants it. For heads that mix: whole:
    the states [batch, token, width] per tap; keep: bool [batch, token], which of their tokens are the rows; around:
    what surrounds them. states: [rows, width] by depth, of all depths, where a loss wants more of them than heads read.
    """

    hidden: list[Tensor]
    final: Tensor
    targets: Tensor | None = None
    position: Tensor | None = None
    sample: Tensor | None = None
    whole: list[Tensor] = field(default_factory=list)
    keep: Tensor | None = None
    around: Around | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    last: Tensor | None = None

    def kept(self) -> list[Tensor]:
        """Return all states, which fill the memory where they are kept."""
        return [*self.whole, *self.hidden, self.final, *([] if self.last is None else [self.last])]


class Backbone(ABC):
    """The user's model as a chain of `depth` blocks; never forked, never re-classed."""

    model: nn.Module
    #: block names in order; a shared block appears once per time it runs
    names: Sequence[str]
    #: whether `observe` can give whole sequences, as heads that mix need
    sequences: bool = False
    #: whether more than `pool` runs between the last block and what the readout takes
    tail: bool = False
    #: whether calls carry a noise level, as those of denoisers do
    timed: bool = False
    #: whether `drive` sees to compile=True itself, because its blocks cannot be compiled each alone
    compiles: bool = False

    @property
    def depth(self) -> int:
        """Number of blocks the full model runs."""
        return len(self.names)

    @abstractmethod
    def taps(self) -> Sequence[Tap]:
        """Return every tap, shallow first: `taps()[k-1].depth == k`."""

    @abstractmethod
    def context(self) -> HeadContext:
        """Return the model's own readout; raises `UnsupportedModel` when it is not understood."""

    @abstractmethod
    def chain(self) -> Chain:
        """Return the blocks with the facts about how they are called."""

    @abstractmethod
    def pool(self, hidden: Tensor) -> Tensor:
        """Return the part of a hidden state that a head reads: [batch, ...] -> [rows, width]."""

    @abstractmethod
    def call(self, batch: Any) -> Any:
        """Run the model's own forward on one batch of the user's data and return its output."""

    @abstractmethod
    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Run the full model on one batch and return the states at `depths`; nothing changed. Gradients are the
        caller's choice; whole: fill `Observed.whole` too (only where `sequences` is set)."""

    def batched(self, data: Any, batch_size: int, seed: int | None = None) -> Any:
        """Return data as batches of this model where it is a data set of its framework, else as it is.

        seed: of the order of rows, another one each time round; None for the order of the data.
        """
        return data

    def generated(self, batch: Any) -> Tensor:
        """Return which generated token, from 0, each place [batch, token] of a batch predicts; prompts are negative.
        Raises `BadArgument` for models that generate no tokens."""
        raise BadArgument(
            f"{type(self.model).__name__} generates no tokens, so its places have no schedule; leave schedule out"
        )

    @abstractmethod
    def drive(self, run: Run) -> Undo:
        """Make the user's calls exit early as `run` says; returns the exact undo."""

    def window(self, start: int, stop: int, hidden: Tensor | None = None) -> AbstractContextManager[Any]:
        """Return a context in which a call of the model runs only blocks start < i <= stop, from `hidden` at `start`.
        """
        return self.chain().window(start, stop, hidden)

    def flag(self) -> Mapping[str, Any] | None:
        """Return the dict under `early_exit` in the model's own config, or None."""
        found: Mapping[str, Any] | None = getattr(getattr(self.model, "config", None), "early_exit", None)
        return found  # anything that is no dict is refused by `enable`, with the value in the message

    def fingerprint(self) -> dict[str, Any]:
        """Return what an exits directory must agree with: architecture, depth, width, classes."""
        context = self.context()
        return {
            "architecture": type(self.model).__name__,
            "depth": self.depth,
            "width": context.width,
            "classes": context.classes,
        }
