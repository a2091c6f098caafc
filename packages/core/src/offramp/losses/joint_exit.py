"""Train light heads and light gates on a frozen model in turns, so that heads learn the rows that leave there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.kernels.halting import joint
from offramp.loss import Loss, Moment, label_losses, labelled, row_losses, weigh

CRITERIA = ("loss", "right", "sure")
#: positives weigh at most this much more than negatives
HEAVIEST = 5.0


@register("joint_exit")
@dataclass(frozen=True)
class JointExit(Loss):
    """Heads first, then heads and gates in turns: heads on the rows that gates send them, gates on what heads achieve.

    warmup: share of the steps in which heads alone are trained, weighed by `weighting`; then phases of `period` steps
    (fewer where fewer than two of each kind would fit): for heads, each row's losses weighed by the chance P to leave
    there, times the ratio of the unweighted to the weighted sum, taken as a constant; for gates, the target of exit l
    is whether it is at or above the exit of least `criterion` + cost * depth / full depth (the full model included),
    positives weighing min(negatives / positives, 5) of the batch. criterion: "loss", "right" (-1 where the answer is
    right) or "sure" (-top1 there). cost is the only knob between speed and quality: one training per setting. Needs
    labels, `attach(..., gate="jei")` and a frozen model. Raises `BadArgument`. Paper: JEI-DNN (ICLR 2024), cost 0.7,
    period 200; its code lets gradients through the ratio, which undoes the weighting.
    """

    beside: ClassVar[str] = "jei"
    frozen: ClassVar[bool] = True
    cost: float = 0.7
    warmup: float = 0.2
    period: int = 200
    criterion: str = "loss"
    weighting: str = "inverse"

    def __post_init__(self) -> None:
        for name, high in (("cost", math.inf), ("warmup", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < high:
                raise BadArgument(f"joint_exit: {name} must be a number from 0 to below {high:g}, not {value!r}")
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise BadArgument(f"joint_exit: period must be a whole number of steps, not {self.period!r}")
        if self.criterion not in CRITERIA:
            raise BadArgument(f"joint_exit: criterion {self.criterion!r} is not one of {', '.join(CRITERIA)}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def phase(self, step: int, steps: int) -> str:
        """Return what step `step` of `steps` trains: "warmup", "heads" or "gates"."""
        start = int(self.warmup * steps)
        if step < start:
            return "warmup"
        period = max(1, min(self.period, (steps - start) // 4))
        return "gates" if (step - start) // period % 2 else "heads"

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one loss per exit, mean over labelled rows, as in the warm-up; `final` is not used."""
        return label_losses(predictions, targets, "joint_exit")

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the loss of this step's phase; raises `BadArgument` where the moment has no log-odds or depths."""
        moment = moment or Moment()
        if moment.odds is None or not moment.depths:
            raise BadArgument('loss "joint_exit" needs depths and the log-odds of gate "jei"; train with offramp.fit')
        keep = labelled(targets, "joint_exit")
        phase = self.phase(moment.step, moment.steps)
        if phase == "warmup":
            return weigh(self.each(predictions, final, targets), self.weighting) * moment.scale
        if phase == "heads":
            losses = torch.stack([row_losses(p, targets) for p in predictions], 1)[keep]  # type: ignore[arg-type]
            return moment.scale * weighed(losses, joint(moment.odds.detach().sigmoid())[0][keep, :-1])
        said = [p.detach()[keep] for p in (*predictions, final)]
        return gate_loss(moment.odds[keep], self.stays(said, targets[keep], moment.depths))  # type: ignore[index]

    def stays(self, said: Sequence[Tensor], targets: Tensor, depths: Sequence[int]) -> Tensor:
        """Return which gates should be open, 0/1 [rows, exits]: those at or above the best place to leave."""
        if self.criterion != "loss" and targets.is_floating_point():
            raise BadArgument(f"joint_exit: labels are numbers, which have no {self.criterion!r}; use criterion='loss'")
        if self.criterion == "loss":
            value = torch.stack([row_losses(p, targets) for p in said], 1)
        else:
            right = torch.stack([(p.argmax(-1) == targets).float() for p in said], 1)
            sure = torch.stack([p.float().softmax(-1).amax(-1) for p in said], 1)
            value = -right if self.criterion == "right" else -right * sure
        price = torch.tensor(depths, device=value.device) / depths[-1]
        best = (value + self.cost * price).argmin(1, keepdim=True)
        return (torch.arange(len(said) - 1, device=value.device) >= best).float()


def weighed(losses: Tensor, chance: Tensor) -> Tensor:
    """Return the mean over rows and exits of losses [rows, exits], weighed row by row by `chance` [rows, exits].

    A row's weighted losses are scaled back to its unweighted sum by a constant; a row with no weight adds nothing.
    """
    weighted = losses * chance
    total = weighted.detach().sum(1)
    ratio = torch.where(total > 0, losses.detach().sum(1) / torch.where(total > 0, total, 1), 0)
    return (weighted * ratio[:, None]).sum() / max(1, losses.numel())


def gate_loss(odds: Tensor, wanted: Tensor) -> Tensor:
    """Return the binary cross-entropy of log-odds with targets, both [rows, exits], rare positives weighing more."""
    count = wanted.sum(0)
    heavy = ((len(wanted) - count) / count.clamp(min=0.1)).clamp(max=HEAVIEST)
    return binary_cross_entropy_with_logits(odds, wanted, pos_weight=heavy, reduction="sum") / max(1, wanted.numel())
