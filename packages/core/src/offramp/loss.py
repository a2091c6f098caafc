"""The contract of a training loss over the predictions of all exits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import BadArgument, UnknownName, did_you_mean

if TYPE_CHECKING:
    from offramp.attach import Exits

#: targets with this value are left out, as everywhere in torch and transformers
IGNORE = -100
#: how much each exit weighs: name -> weights before normalisation, shallow exit first
WEIGHTINGS = {
    "uniform": lambda k: [1.0] * k,
    "linear": lambda k: [float(j + 1) for j in range(k)],
    "inverse": lambda k: [float(k - j) for j in range(k)],
    "sum": lambda k: [(j + 1) * (j + 2) / 2 for j in range(k)],
}


def weigh(losses: Sequence[Tensor], weighting: str) -> Tensor:
    """Return the weighted mean of per-exit losses; `weighting` is uniform, linear (deep exits more), inverse or
    sum (1, 3, 6, ...: deep exits most)."""
    if weighting not in WEIGHTINGS:
        raise UnknownName(f"no weighting is called {weighting!r};{did_you_mean(weighting, WEIGHTINGS)}")
    if not losses:
        raise BadArgument('this loss trains exits, and there are none; attach some, or train with loss="layerskip"')
    raw = WEIGHTINGS[weighting](len(losses))
    stacked = torch.stack(list(losses))
    return (stacked * stacked.new_tensor(raw)).sum() / sum(raw)


def row_losses(prediction: Tensor, targets: Tensor) -> Tensor:
    """Return one loss per row [rows]: cross-entropy in nats of class labels (0 where they are -100), or of numbers the
    squared error, mean over outputs.

    prediction: [rows, classes]; targets: LongTensor [rows], or floats [rows] or [rows, outputs]. Raises `BadArgument`.
    """
    said = prediction.float()
    if not targets.is_floating_point():
        return functional.cross_entropy(said, targets, ignore_index=IGNORE, reduction="none")
    wanted = targets.float().reshape(len(targets), -1)
    if wanted.shape != said.shape:
        raise BadArgument(
            f"labels are numbers of shape {list(targets.shape)} and predictions {list(said.shape)}; for regression "
            f"give one number per output, for classes give whole numbers (torch.long)"
        )
    return (said - wanted).square().mean(-1)


def labelled(targets: Tensor | None, name: str) -> Tensor:
    """Return which rows have a label, a bool mask [rows]; raises `BadArgument` where the data has none at all."""
    if targets is None:
        raise BadArgument(
            f'loss "{name}" needs labels, and the data has none; give batches with labels, or use loss="distill", '
            "which learns from the model's own output"
        )
    if targets.is_floating_point():
        return targets.new_ones(len(targets), dtype=torch.bool)
    return targets != IGNORE


def label_losses(predictions: Sequence[Tensor], targets: Tensor | None, name: str) -> list[Tensor]:
    """Return for each of several predictions [rows, classes] the mean of `row_losses` over labelled rows, 0 where there
    are none; raises `BadArgument` for data without labels, in the name of the loss."""
    rows = labelled(targets, name).sum().clamp(min=1)
    return [row_losses(said, targets).sum() / rows for said in predictions]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Schedule:
    """How much exits weigh in the course of training: from `start` to `stop` within `over` steps, then `stop`.

    shape: "linear" or "cosine"; start < stop is a warm-up, start > stop a cool-down. Raises `BadArgument`. Paper:
    EE-LLM (Chen et al., arXiv 2312.04916).
    """

    shape: str
    start: float
    stop: float
    over: int

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine"):
            raise BadArgument(f'schedule: shape must be "linear" or "cosine", not {self.shape!r}')
        for name in ("start", "stop"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise BadArgument(f"schedule: {name} must be a weight from 0 on, not {value!r}")
        if isinstance(self.over, bool) or not isinstance(self.over, int) or self.over < 1:
            raise BadArgument(f"schedule: over must be a whole number of steps, at least 1, not {self.over!r}")

    def at(self, step: int) -> float:
        """Return the weight in step `step`, counted from 0."""
        done = min(1.0, step / self.over)
        done = done if self.shape == "linear" else 0.5 * (math.cos(math.pi * (done + 1)) + 1)
        return self.start + (self.stop - self.start) * done


@dataclass(frozen=True)
class Moment:
    """What else is known in a training step. scale: of the exits' weights, from a `Schedule`; depths: of the exits that
    take part and of the full model; states: [rows, width] by depth, at the exits, the loss's `taps` and the last block,
    where a loss has taps; odds: log-odds [rows, exits] of the gate beside the exits, where a loss trains it with them;
    step of steps: where the training is; more: what the loss's own `read` gave it beside predictions.
    """

    scale: float = 1.0
    depths: tuple[int, ...] = ()
    states: Mapping[int, Tensor] = field(default_factory=dict)
    odds: Tensor | None = None
    step: int = 0
    steps: int = 1
    more: Any = None


class Loss(ABC):
    """A training objective over per-exit predictions; a frozen dataclass, registered under its file's name."""

    #: whether it trains gates: predictions are then one logit per row, targets [rows, K] whether each exit is right
    gate: ClassVar[bool] = False
    #: of a loss that trains gates: whether that is the one which all exits share, instead of those of the heads
    shared: ClassVar[bool] = False
    #: of a loss that trains heads and the gate beside them together: the gate's name; `Moment.odds` is then there
    beside: ClassVar[str] = ""
    #: whether it is about a model as it is, which must not be trained with it
    frozen: ClassVar[bool] = False
    #: whether it trains the last layer too, where the model is trained
    last: ClassVar[bool] = False
    #: whether gradients are rescaled on their way through the model, so that no layer gets more for being under many
    #: exits
    equilibrium: ClassVar[bool] = False
    #: whether `read` wants the whole state after the last block too
    deepest: ClassVar[bool] = False
    weighting: str

    def read(
        self, exits: Exits, hidden: Sequence[Tensor], final: Tensor, targets: Tensor | None, active: Sequence[int]
    ) -> tuple[list[Tensor], Tensor | None, Any]:
        """Return (what the `active` exits say, targets, what else the loss's call wants: `Moment.more`).

        hidden: what each exit reads, [rows, ...], and after them, of a `deepest` loss, the whole state after the last
        block; final: the full model's logits.
        """
        return [exits[exits.at[i]](hidden[i]) for i in active], targets, None

    def check(self, exits: Exits) -> None:  # noqa: B027  (most can train any)
        """Raise `BadArgument` for exits that it cannot train."""

    def opening(self) -> Loss | None:
        """Return the loss of the first of two stages, which trains the model; None for that of its last layer alone."""
        return None

    def active(self, step: int, steps: int, count: int) -> Sequence[int]:
        """Return which of `count` exits take part in training step `step` of `steps`; all, unless a loss takes turns.
        """
        return range(count)

    def taps(self, at: Sequence[int], depth: int) -> Sequence[int]:
        """Return depths beside those of the exits whose states the loss wants; only where the backbone is trained."""
        return ()

    @abstractmethod
    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one scalar per exit. predictions: K tensors [rows, classes]; final: the full model's logits."""

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the weighted scalar loss. Shapes: predictions K x [rows, classes], final [rows, classes], targets
        [rows]. active: which of the model's `exits` exits the predictions come from (all when None); moment: None for
        full weights and no states.
        """
        return weigh(self.each(predictions, final, targets), self.weighting) * (moment or Moment()).scale
