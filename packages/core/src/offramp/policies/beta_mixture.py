"""Exit above a threshold that follows how often early answers turn out to be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.policy import Evidence, ExitPolicy, Feedback, State, thresholds

ON = ("margin", "top1")
#: (alpha, beta) before anything is known, of answers that turn out wrong and right; thresholds to choose from
START, GRID = ((1.0, 2.0), (2.0, 1.0)), (0.3, 0.9, 10)
#: scores are kept this far from 0 and 1, where the densities have no bounds
EDGE = 1e-4


@register("beta_mixture")
@dataclass(frozen=True)
class BetaMixture(ExitPolicy):
    """Stop a row when its score reaches a threshold that is estimated anew after each call of `generate`.

    Where deep blocks run later over tokens that left early (kv="catch_up"), pairs of score and "the full model agrees"
    come in. Scores of right and of wrong answers are two Beta distributions; the threshold is the least of ten from
    0.3 to 0.9 from which on the share of the right one in the sum of both densities is above zeta. Without such pairs
    (verify, other kv, one answer per call) the threshold stays as given.

    threshold: in [0, 1], holds until the first pairs; on: the score, "margin" or "top1"; mix: in [0, 1], weight of the
    mixture's own opinion beside the label's when a pair is assigned; zeta: between 0 and 1, higher is safer, slower.
    Raises `BadArgument`. Paper: FREE (Bae et al., arXiv 2310.05424), as its text says: in the authors' code the label
    overwrites the mixture's opinion. Both distributions weigh alike, as there. Sums over all pairs are kept instead of
    the pairs, and they start from one pair of each kind, so that a handful cannot make a needle of a distribution.
    """

    threshold: float = 0.9
    on: str = "margin"
    mix: float = 0.8
    zeta: float = 0.4

    def __post_init__(self) -> None:
        if isinstance(self.threshold, (list, tuple)):
            raise BadArgument(f"beta_mixture: all exits share one threshold; give one number, not {self.threshold!r}")
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, 1.0, "beta_mixture"))
        if self.on not in ON:
            raise BadArgument(f"beta_mixture: on={self.on!r} is no score; choose one of {', '.join(ON)}")
        for name in ("mix", "zeta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise BadArgument(f"beta_mixture: {name} must be a number from 0 to 1, not {value!r}")

    def statistics(self) -> frozenset[str]:
        """Return the score alone."""
        return frozenset({self.on})

    def start(self, batch: int, device: torch.device | str) -> State:
        """Return the distributions [rows, 2, 2], their sums [rows, 2, 3] and the threshold [rows]."""
        shape = torch.tensor(START, device=device).expand(batch, 2, 2)
        mean = shape[..., 0] / shape.sum(-1)
        square = mean * (shape[..., 0] + 1) / (shape.sum(-1) + 1)
        sums = torch.stack([torch.ones_like(mean), mean, square], -1)
        return {"shape": shape, "sums": sums, "threshold": torch.full((batch,), self.threshold, device=device)}

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the rows whose score has reached the threshold as it stands."""
        return seen[self.on] >= state["threshold"], state

    def learn(self, state: State, feedback: Feedback) -> State:
        """Take in pairs of score and agreement, one step of expectation maximisation, and choose the threshold anew."""
        if feedback.correct is None or not len(feedback.correct):
            return state
        score = feedback.stats[self.on].to(state["shape"]).clamp(EDGE, 1 - EDGE)
        weight = assign(state["shape"], score, feedback.correct.to(score.device), self.mix)
        powers = torch.stack([torch.ones_like(score), score, score * score], -1)
        sums = state["sums"] + weight @ powers
        shape = fit_moments(sums)
        return {"shape": shape, "sums": sums, "threshold": choose(shape, self.zeta)}

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Refuse: a threshold that moves while it is used has no fixed risk."""
        raise BadArgument(
            f"beta_mixture moves its threshold as it learns, so no promise about it would last; calibrate {self.on!r}: "
            f'offramp.calibrate(trace, "{"margin" if self.on == "margin" else "confidence"}")'
        )


def log_density(shape: Tensor, score: Tensor) -> Tensor:
    """Return the log density [..., 2, n] of scores [n] under Beta distributions with shape [..., 2, (alpha, beta)]."""
    a, b = shape[..., 0, None], shape[..., 1, None]
    return (a - 1) * score.log() + (b - 1) * (-score).log1p() - (a.lgamma() + b.lgamma() - (a + b).lgamma())


def assign(shape: Tensor, score: Tensor, correct: Tensor, mix: float) -> Tensor:
    """Return how much of each pair belongs to the wrong and to the right ones, [..., 2, n]; sums to 1 over the two.

    mix * (share of the likelihood) + (1 - mix) * (1 for the pair's own label, else 0). score, correct: [n].
    """
    label = torch.stack([~correct.bool(), correct.bool()]).to(score)
    return mix * log_density(shape, score).softmax(-2) + (1 - mix) * label


def fit_moments(sums: Tensor) -> Tensor:
    """Return (alpha, beta) [..., 2] with the mean and variance of weighted sums [..., (weight, score, score squared)].
    """
    mean = (sums[..., 1] / sums[..., 0]).clamp(EDGE, 1 - EDGE)
    spread = mean * (1 - mean)
    variance = (sums[..., 2] / sums[..., 0] - mean * mean).clamp(min=EDGE * EDGE)
    strength = (spread / variance - 1).clamp(min=EDGE)  # scores of 0 and 1 alone have variance = spread
    return torch.stack([mean * strength, (1 - mean) * strength], -1)


def choose(shape: Tensor, zeta: float) -> Tensor:
    """Return the threshold [...] for two Beta distributions [..., 2, 2]; the right ones are those with the larger mean.

    With m of the ten grid points marked (density share above zeta) it is the m-th from the top, or the top itself.
    """
    grid = torch.linspace(*GRID, device=shape.device, dtype=shape.dtype)
    density = log_density(shape, grid)
    mean = shape[..., 0] / shape.sum(-1)
    gap = density[..., 1, :] - density[..., 0, :]
    gap = torch.where((mean[..., 1] >= mean[..., 0])[..., None], gap, -gap)
    marked = (gap.sigmoid() > zeta).sum(-1)  # = share of the right ones' density in the sum of both
    return grid[(len(grid) - marked).clamp(0, len(grid) - 1)]
