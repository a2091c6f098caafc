"""Train a model so that its early layers can be decoded: the last layer and the exits together, exits in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import IGNORE, WEIGHTINGS, Loss, Moment, weigh

CURRICULA = ("rotational", "gradual", "none")


@register("layerskip")
@dataclass(frozen=True)
class LayerSkip(Loss):
    """Cross-entropy of the last layer and of the exits, weighted with depth; for `fit(..., backbone=True)`.

    With K exits, exit j weighs e_scale * weighting(j) and the last layer K + 1 + e_scale * K (K + 1) / 2, normalised
    over what takes part in the step. curriculum: "rotational" (every `rotation`-th exit, the offset moves each step),
    "gradual" (from the deepest exit to the shallowest during the first half of training) or "none". Two options are
    not in the paper and raise agreement, which drafts live on: own, the share of the exits' loss that is the divergence
    from the model's own last layer instead of the labels; and pull, the weight, beside the last layer's cross-entropy,
    of its divergence from the exits, so that it says something else only where that pays. targets: LongTensor [rows],
    -100 is left out. Raises `BadArgument`. Paper: LayerSkip (Elhoushi et al., arXiv 2404.16710).
    """

    last: ClassVar[bool] = True
    e_scale: float = 1.0
    curriculum: str = "rotational"
    rotation: int = 3
    own: float = 0.0
    pull: float = 0.0
    weighting: str = "sum"

    def __post_init__(self) -> None:
        if not 0 < self.e_scale < math.inf:
            raise BadArgument(f"layerskip: e_scale must be a number above 0, not {self.e_scale!r}; the paper has 0.1-1")
        if self.curriculum not in CURRICULA:
            raise BadArgument(f"layerskip: curriculum {self.curriculum!r} is not one of {', '.join(CURRICULA)}")
        if isinstance(self.rotation, bool) or not isinstance(self.rotation, int) or self.rotation < 1:
            raise BadArgument(f"layerskip: rotation must be a whole number >= 1, not {self.rotation!r}")
        if not 0 <= self.own <= 1:
            raise BadArgument(f"layerskip: own must be a share from 0 to 1, not {self.own!r}")
        if not 0 <= self.pull < math.inf:
            raise BadArgument(f"layerskip: pull must be a weight from 0 on, not {self.pull!r}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def active(self, step: int, steps: int, count: int) -> Sequence[int]:
        """Return the exits of this step; never none."""
        if self.curriculum == "gradual":
            done = min(1.0, 2 * (step + 1) / steps)
            return range(count - max(1, math.ceil(done * count)), count)
        if self.curriculum == "rotational":
            turn = max(1, min(self.rotation, count))
            return range(step % turn, count, turn)
        return range(count)

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one loss in nats per exit; no gradient reaches the last layer through it."""
        if targets is None:
            raise BadArgument('loss "layerskip" needs labels; for a language model give them as labels=input_ids')
        out = [_cross_entropy(p, targets) for p in predictions]
        if self.own:
            log_p = final.detach().float().log_softmax(-1)
            for i, prediction in enumerate(predictions):
                out[i] = (1 - self.own) * out[i] + self.own * _divergence(log_p, prediction)
        return out

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the weighted mean over the exits that take part and the last layer."""
        count = len(predictions) if exits is None else exits
        taking = range(count) if active is None else active
        raw = WEIGHTINGS[self.weighting](count)
        scale = (moment or Moment()).scale
        weights = [scale * self.e_scale * raw[j] for j in taking] + [count + 1 + self.e_scale * count * (count + 1) / 2]
        if targets is None:
            raise BadArgument('loss "layerskip" needs labels; for a language model give them as labels=input_ids')
        last = _cross_entropy(final, targets)
        if self.pull and predictions:
            teachers = [p.detach().float().log_softmax(-1) for p in predictions]
            last = last + self.pull * torch.stack([_divergence(log_p, final) for log_p in teachers]).mean()
        losses = torch.stack([*self.each(predictions, final, targets), last])
        return (losses * losses.new_tensor(weights)).sum() / sum(weights)


def _divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p, softmax(logits)) in nats, mean over rows."""
    log_q = logits.float().log_softmax(-1)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    rows = (targets != IGNORE).sum().clamp(min=1)
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum") / rows
