"""The contract of a training loss over the predictions of all exits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

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


class Loss(ABC):
    """A training objective over per-exit predictions; a frozen dataclass, registered under its file's name."""

    #: whether it trains gates: predictions are then one logit per row, targets [rows, K] whether each exit is right
    gate: ClassVar[bool] = False
    weighting: str

    def read(
        self, exits: Exits, hidden: Sequence[Tensor], final: Tensor, targets: Tensor | None, active: Sequence[int]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return (what the `active` exits say, targets). hidden: what each exit reads, [rows, ...]; final: the full
        model's logits."""
        return [exits[exits.at[i]](hidden[i]) for i in active], targets

    def active(self, step: int, steps: int, count: int) -> Sequence[int]:
        """Return which of `count` exits take part in training step `step` of `steps`; all, unless a loss takes turns.
        """
        return range(count)

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
    ) -> Tensor:
        """Return the weighted scalar loss. Shapes: predictions K x [rows, classes], final [rows, classes], targets
        [rows]. active: which of the model's `exits` exits the predictions come from (all when None).
        """
        return weigh(self.each(predictions, final, targets), self.weighting)
