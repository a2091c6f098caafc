"""Train a shallow part of a model to go, in fewer blocks, where the whole model goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import IGNORE, WEIGHTINGS, Loss, Moment, weigh

MAPS = ("last", "unif", "dyna")


@register("layerwise_distill")
@dataclass(frozen=True)
class LayerwiseDistill(Loss):
    """Cross-entropy of exits and last layer, plus `share` times the distance between states; fit(..., backbone=True).

    Exits weigh their depth S (times `weighting`), the last layer L, normalised. The shallow part is the first S blocks,
    up to the deepest exit; its teachers are the states, without gradient, after every L / S blocks. map: "last" (state
    S learns from state L alone), "unif" (state j from the j-th teacher) or "dyna" (each teacher, from the last one on,
    teaches the nearest state that is no deeper than the one taught before). Distance: mean squared difference of the
    states before the final norm, mean over pairs. Made for models that are trained already: teachers are built on their
    students, and in a fresh model, where all states still move, they can run away from them. targets: LongTensor
    [rows], -100 is left out. Raises `BadArgument`. Paper: FREE (Bae et al., arXiv 2310.05424).
    """

    last: ClassVar[bool] = True
    share: float = 0.5
    map: str = "dyna"
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 <= self.share < math.inf:
            raise BadArgument(f"layerwise_distill: share must be a number from 0 on, not {self.share!r} (paper: 0.5)")
        if self.map not in MAPS:
            raise BadArgument(f"layerwise_distill: map {self.map!r} is not one of {', '.join(MAPS)}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def taps(self, at: Sequence[int], depth: int) -> Sequence[int]:
        """Return the depths of students and teachers."""
        if not at:
            raise BadArgument('loss "layerwise_distill" trains exits, and there are none; attach some')
        students, teachers = _depths(max(at), depth)
        return sorted({*students, *teachers} - {depth})

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one cross-entropy in nats per exit; `final` is not used."""
        if targets is None:
            raise BadArgument('loss "layerwise_distill" needs labels; for a language model: labels=input_ids')
        rows = (targets != IGNORE).sum().clamp(min=1)
        return [
            functional.cross_entropy(p.float(), targets, ignore_index=IGNORE, reduction="sum") / rows
            for p in predictions
        ]

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the weighted mean of the cross-entropies, plus the distance of the states where `moment` has them."""
        moment = moment or Moment(depths=tuple(range(1, len(predictions) + 2)))
        raw = WEIGHTINGS[self.weighting](len(predictions))
        *shallow, deep = moment.depths
        weights = [moment.scale * w * d for w, d in zip(raw, shallow, strict=True)] + [float(deep)]
        losses = torch.stack(self.each([*predictions, final], final, targets))
        value = (losses * losses.new_tensor(weights)).sum() / sum(weights)
        if moment.states and self.share:
            value = value + self.share * moment.scale * self.distance(moment.states, max(shallow), deep)
        return value

    def distance(self, states: Mapping[int, Tensor], shallow: int, depth: int) -> Tensor:
        """Return the mean over pairs of student and teacher; states: [rows, width] by depth."""
        students, teachers = _depths(shallow, depth)

        def apart(student: int, teacher: int) -> Tensor:
            return functional.mse_loss(states[student].float(), states[teacher].detach().float())

        if self.map == "last":
            return apart(shallow, depth)
        if self.map == "unif":
            return torch.stack([apart(s, t) for s, t in zip(students, teachers, strict=True)]).mean()
        found, top = [], shallow
        for teacher in reversed(teachers):
            near = [apart(s, teacher) for s in students[:top]]
            best = min(range(top), key=lambda i: float(near[i].detach()))
            found.append(near[best])
            top = best + 1
        return torch.stack(found).mean()


def _depths(shallow: int, depth: int) -> tuple[list[int], list[int]]:
    """Return the depths of the students, 1 to S, and of their teachers: every L / S blocks, the last one L."""
    students = list(range(1, shallow + 1))
    return students, [round(j * depth / shallow) for j in students]
