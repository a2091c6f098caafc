"""In which stages `fit` trains: what each of them trains, on which loss, for how many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offramp.errors import BadArgument, UnknownName, did_you_mean
from offramp.loss import Loss, Moment, label_losses, weigh

NAMES = ("frozen", "joint", "two_stage", "alternate")


@dataclass(frozen=True)
class Stage:
    """One stretch of a training: `steps` steps of `loss`, with the model or without it."""

    loss: Loss
    steps: int
    backbone: bool


@dataclass(frozen=True)
class LastLayer(Loss):
    """The loss of the full model's own prediction, as "labels" has it for exits; no exit takes part."""

    last: ClassVar[bool] = True
    weighting: str = "uniform"

    def active(self, step: int, steps: int, count: int) -> Sequence[int]:
        """Return no exit."""
        return ()

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return nothing: there is no exit."""
        return []

    def __call__(
        self,
        predictions: Sequence[Tensor],
        final: Tensor,
        targets: Tensor | None = None,
        active: Sequence[int] | None = None,
        exits: int | None = None,
        moment: Moment | None = None,
    ) -> Tensor:
        """Return the mean over labelled rows."""
        return label_losses([final], targets, "the last layer")[0]


@dataclass(frozen=True)
class WithLast(Loss):
    """Another loss of the exits, and that of the last layer, which weighs as one more exit, the deepest.

    turns: in every other step, the first among them, the last layer alone. Paper: BERxiT (Xin et al., EACL 2021).
    """

    last: ClassVar[bool] = True
    inner: Loss
    turns: bool = False

    def active(self, step: int, steps: int, count: int) -> Sequence[int]:
        """Return the exits of this step."""
        return () if self.turns and step % 2 == 0 else self.inner.active(step, steps, count)

    def each(self, predictions: Sequence[Tensor], final: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return one loss per exit."""
        return self.inner.each(predictions, final, targets)

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
        last, scale = LastLayer()(predictions, final, targets), (moment or Moment()).scale
        parts = [scale * part for part in self.each(predictions, final, targets)] if predictions else []
        return weigh([*parts, last], self.inner.weighting)


def plan(schedule: str | None, loss: Loss, steps: int, backbone: bool) -> list[Stage]:
    """Return the stages of a training of `steps` steps in all; raises `BadArgument`, `UnknownName`.

    schedule: None for one stage, with the model as `backbone` says; "frozen": one without it; "joint": one with it, the
    last layer trained beside the exits; "two_stage": half of the steps for model and last layer alone (DeeBERT) or on
    what the loss opens with, then half for the exits of the frozen model; "alternate": with the model, the last layer
    alone in every other step, all together in the others (BERxiT).
    """
    if schedule is None:
        return [Stage(loss, steps, backbone)]
    if schedule not in NAMES:
        raise UnknownName(f"no schedule is called {schedule!r};{did_you_mean(schedule, NAMES)}")
    if backbone:
        raise BadArgument(f"schedule={schedule!r} says itself when the model is trained; leave backbone out")
    if schedule == "frozen":
        return [Stage(loss, steps, False)]
    if schedule == "two_stage":
        if steps < 2:
            raise BadArgument(f"steps={steps} leaves a stage without any; give at least 2, e.g. steps=500")
        return [Stage(loss.opening() or LastLayer(), steps // 2, True), Stage(loss, steps - steps // 2, False)]
    if loss.last and schedule == "joint":
        return [Stage(loss, steps, True)]
    if loss.last or loss.frozen or loss.beside:
        raise BadArgument(f'{loss} cannot be trained with schedule={schedule!r}; use "frozen" or "two_stage"')
    return [Stage(WithLast(loss, schedule == "alternate"), steps, True)]
