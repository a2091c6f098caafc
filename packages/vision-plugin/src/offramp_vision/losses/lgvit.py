"""LGViT's training: first model and exits together, then the exits learn from the model, and from one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from offramp._registry import create, register
from offramp.errors import BadArgument
from offramp.loss import Loss, Moment, label_losses, weigh
from offramp_vision.heads._perceive import Perceive
from offramp_vision.heads.global_aggregation import GlobalAggregation
from offramp_vision.layouts import map_of

if TYPE_CHECKING:
    from offramp.attach import Exits


class Perceived(NamedTuple):
    """What heads saw, and what they should have. features: per exit [batch, token, width]; strides: per exit that of
    global aggregation, 0 for local perception; teacher: the model's own last state, normed, [batch, width, row,
    column].
    """

    features: Sequence[Tensor]
    strides: Sequence[int]
    teacher: Tensor


@register("lgvit")
@dataclass(frozen=True)
class LgvitLoss(Loss):
    """Labels and the full model's answer for predictions, and its last tokens for what heads perceive; model frozen.

    Per exit 1 - alpha times the cross-entropy plus alpha times the divergence from the full model's distribution,
    softened by `temperature` and times its square. Beside it, over the number of exits: `heterogeneous` times the
    divergence, over channels, of the model's last patch tokens (strided as the head's are) from the tokens of the first
    and last head of each kind; `homogeneous` times the squared distance of each head from the last of its kind, of
    tokens for local perception, of Gram matrices (per token, for strides differ) for global aggregation. No gradient
    reaches a teacher. Tokens whose width or grid differ, as those of stages do, are not compared. With
    fit(..., schedule="two_stage") model and exits are trained first, see `Alternating`. For heads lgvit,
    local_perception and global_aggregation. targets: LongTensor [rows], -100 is left out. Raises `BadArgument`. Paper:
    LGViT (Xu et al., ACM MM 2023, arXiv 2308.00255).
    """

    frozen: ClassVar[bool] = True
    deepest: ClassVar[bool] = True
    alpha: float = 0.3
    temperature: float = 2.0
    heterogeneous: float = 0.01
    homogeneous: float = 0.01
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise BadArgument(f"lgvit: alpha must be a share from 0 to 1, not {self.alpha!r}")
        if not 0 < self.temperature < math.inf:
            raise BadArgument(f"lgvit: temperature must be a number above 0, not {self.temperature!r}")
        for name in ("heterogeneous", "homogeneous"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadArgument(f"lgvit: {name} must be a weight from 0 on, not {getattr(self, name)!r}")
        weigh([torch.zeros(())], self.weighting)  # an unknown weighting is refused here, not at the first step

    def check(self, exits: Exits) -> None:
        """Raise `BadArgument` for other heads than LGViT's."""
        if not all(isinstance(perceiver(exits[d]), Perceive) for d in exits):
            raise BadArgument(
                f'loss "lgvit" trains what its heads perceive, and heads {exits.head!r} perceive nothing; attach '
                f"head='lgvit', 'local_perception' or 'global_aggregation', or use loss='labels'"
            )

    def opening(self) -> Loss:
        """Return the loss of the first of two stages."""
        return Alternating()

    def read(
        self, exits: Exits, hidden: Sequence[Tensor], final: Tensor, targets: Tensor | None, active: Sequence[int]
    ) -> tuple[list[Tensor], Tensor | None, Any]:
        """Return (what exits say, targets, what their heads `Perceived`)."""
        *hidden, last = hidden
        heads = [perceiver(exits[exits.at[i]]) for i in active]
        features = [head.perceive(hidden[i]) for i, head in zip(active, heads, strict=True)]
        said = [head.read(seen, hidden[i]) for i, head, seen in zip(active, heads, features, strict=True)]
        strides = [head.stride if isinstance(head, GlobalAggregation) else 0 for head in heads]
        return said, targets, Perceived(features, strides, teacher_of(exits, last))

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one loss in nats per exit."""
        wrong = label_losses(predictions, targets, "lgvit")
        apart = create(Loss, "distill", temperature=self.temperature).each(predictions, final, targets)
        return [(1 - self.alpha) * w + self.alpha * a for w, a in zip(wrong, apart, strict=True)]

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the weighted mean over exits, plus the distances between tokens where `moment` has them."""
        moment = moment or Moment()
        value = weigh(self.each(predictions, final, targets), self.weighting)
        if moment.more is not None:
            far = self.heterogeneous * heterogeneous(moment.more) + self.homogeneous * homogeneous(moment.more)
            value = value + far / len(predictions)
        return value * moment.scale


@dataclass(frozen=True)
class Alternating(Loss):
    """The model's own cross-entropy in even steps; in odd ones the mean of all, each weighing its depth.

    Paper: LGViT (Xu et al., ACM MM 2023), its first stage.
    """

    last: ClassVar[bool] = True
    weighting: str = "uniform"

    def active(self, step: int, steps: int, count: int) -> Sequence[int]:
        """Return the exits of this step: none in even ones, counted from 0."""
        return range(count) if step % 2 else ()

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one cross-entropy in nats per exit."""
        return label_losses(predictions, targets, "lgvit")

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the mean over exits and last layer, weighed by depth."""
        moment = moment or Moment(depths=tuple(range(1, len(predictions) + 2)))
        *shallow, deep = moment.depths
        losses = torch.stack(self.each([*predictions, final], final, targets))
        weights = losses.new_tensor([moment.scale * d for d in shallow] + [float(deep)])
        return (losses * weights).sum() / weights.sum()


def perceiver(head: Any) -> Any:
    """Return the head that perceives: of a placed one, what stands inside it."""
    return getattr(head, "inner", head)


def teacher_of(exits: Exits, last: Tensor) -> Tensor:
    """Return the state after the last block as a map without prefix tokens, after the norm that the model puts on it.

    Without that norm its channels are on another scale than anything the classifier reads.
    """
    norm, tap = getattr(exits.model, "norm", None), exits.backbone.taps()[-1]
    with torch.no_grad():
        if tuple(getattr(norm, "normalized_shape", ())) == last.shape[-1:]:
            last = norm(last)  # type: ignore[misc]
        return map_of(tap.layout, tap.prefix, tap.grid, last) if tap.grid else last[:, :0, None]


def heterogeneous(seen: Perceived) -> Tensor:
    """Return the divergence of the teacher's tokens from those of the first and last head of each kind, summed over
    heads and tokens, mean over images; 0 where none compares.
    """
    total = seen.teacher.new_zeros(())
    for kind in _kinds(seen):
        for i in sorted({kind[0], kind[-1]}):
            step = seen.strides[i] or 1
            wanted = seen.teacher[:, :, ::step, ::step].flatten(2).transpose(1, 2)
            if wanted.shape == seen.features[i].shape:
                log_q, log_p = seen.features[i].float().log_softmax(-1), wanted.float().log_softmax(-1)
                total = total + functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return total


def homogeneous(seen: Perceived) -> Tensor:
    """Return the squared distances of heads from the last of their kind, summed over heads; 0 where none compares."""
    total = seen.teacher.new_zeros(())
    for kind in _kinds(seen):
        tokens = [seen.features[i].float() for i in kind]
        if seen.strides[kind[0]]:
            tokens = [t.transpose(1, 2) @ t / t.shape[1] for t in tokens]
        *students, teacher = tokens
        for student in students:
            if student.shape == teacher.shape:
                total = total + functional.mse_loss(student, teacher.detach())
    return total


def _kinds(seen: Perceived) -> list[list[int]]:
    """Return the exits with local perception, and those with global aggregation, as far as there are some."""
    local = [i for i, stride in enumerate(seen.strides) if not stride]
    return [kind for kind in (local, [i for i in range(len(seen.strides)) if i not in local]) if kind]
