"""Distil the model's own final prediction into its exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.loss import Loss, weigh


@register("distill")
@dataclass(frozen=True)
class Distill(Loss):
    """KL divergence from the full model's distribution to each head's, times temperature squared, mean over rows.

    temperature: above 0, divides both logits; higher looks more at unlikely classes. top_k: keep only the teacher's k
    likeliest classes, renormalised (0 keeps all). weighting: uniform, linear or inverse. No gradient reaches the
    teacher. Raises `BadArgument`. Paper: Hinton et al., arXiv 1503.02531.
    """

    temperature: float = 1.0
    top_k: int = 0
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise BadArgument(f"distill: temperature must be a number above 0, not {self.temperature!r}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise BadArgument(f"distill: top_k must be a whole number >= 0 (0 keeps all classes), not {self.top_k!r}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one divergence in nats per exit; `targets` are not used."""
        if final.shape[-1] == 1:
            raise BadArgument(
                'distill: one output is no distribution; to learn numbers from the model itself use loss="regression"'
            )
        teacher, kept = final.detach().float() / self.temperature, None
        if 0 < self.top_k < teacher.shape[-1]:
            teacher, kept = teacher.topk(self.top_k, dim=-1)
        log_p = teacher.log_softmax(-1)
        out = []
        for prediction in predictions:
            log_q = (prediction.float() / self.temperature).log_softmax(-1)
            log_q = log_q if kept is None else log_q.gather(-1, kept)
            terms = log_p.exp() * (log_p - log_q)
            # a class the teacher rules out (logit -inf) adds 0, also where the head rules it out: not 0 * inf
            divergence = terms.masked_fill(log_p.isneginf(), 0.0).sum(-1).mean()
            # gradients of softened logits shrink with 1 / T^2; the factor keeps the step size comparable across T
            out.append(divergence * self.temperature**2)
        return out
