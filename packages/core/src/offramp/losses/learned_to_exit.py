"""Train the gate beside the exits to be as certain as each exit is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import Loss, labelled, weigh

if TYPE_CHECKING:
    from offramp.attach import Exits

TOWARDS = ("labels", "full")


@register("learned_to_exit")
@dataclass(frozen=True)
class LearnedToExitLoss(Loss):
    """Squared error between the gate's certainty and whether the exit is right: 1 or 0, of numbers 1 - |tanh(error)|.

    towards: "labels", or "full" for being right as the full model sees it, which needs no labels. predictions: K
    tensors [rows] of log-odds; targets: [rows, K], how right each exit is. Backbone and heads are frozen. weighting: of
    the exits. Raises `BadArgument`. Paper: BERxiT (Xin et al., EACL 2021), whose weighting is uniform.
    """

    gate: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    frozen: ClassVar[bool] = True
    towards: str = "labels"
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if self.towards not in TOWARDS:
            raise BadArgument(f"learned_to_exit: towards {self.towards!r} is not one of {', '.join(TOWARDS)}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def read(
        self, exits: Exits, hidden: Sequence[Tensor], final: Tensor, targets: Tensor | None, active: Sequence[int]
    ) -> tuple[list[Tensor], Tensor | None, Any]:
        """Return (the gate's log-odds [rows] per exit, how right each exit is [rows, exits]), of labelled rows."""
        if self.towards == "full":
            targets = final.detach() if final.shape[-1] == 1 else final.argmax(-1)
        if targets is None:
            raise BadArgument(
                'loss "learned_to_exit" asks whether exits are right, and the data has no labels; give batches with '
                'labels, or offramp.fit(model, data, loss="learned_to_exit", towards="full")'
            )
        with torch.no_grad():
            answers = [exits[depth](h) for depth, h in zip(exits.at, hidden, strict=True)]
            right = torch.stack([_right(answers[i], targets) for i in active], 1)
        keep, odds = labelled(targets, "learned_to_exit"), exits.odds(hidden, answers)
        return [odds[keep, i] for i in active], right[keep], None

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one mean squared error per exit; `final` is not used."""
        if targets is None or targets.dim() != 2:
            raise BadArgument(
                'loss "learned_to_exit" needs to know how right each exit is, targets [rows, exits]; '
                'offramp.fit(model, data, loss="learned_to_exit") makes them'
            )
        rows = max(1, len(targets))
        return [
            (p.float().sigmoid() - t).square().sum() / rows
            for p, t in zip(predictions, targets.float().unbind(1), strict=True)
        ]


def _right(answer: Tensor, wanted: Tensor) -> Tensor:
    """Return how right answers [rows, classes] are, [rows] in [0, 1]."""
    if not wanted.is_floating_point():
        return (answer.argmax(-1) == wanted).float()
    return 1 - (answer.float() - wanted.float().reshape(len(wanted), -1)).tanh().abs().mean(-1)
