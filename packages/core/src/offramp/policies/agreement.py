"""Exit when the prediction has stopped moving from one exit to the next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.policy import Evidence, ExitPolicy, State, ThresholdPolicy, at_exit, thresholds

DISTANCES = ("rms", "mean", "max", "cosine")
# distances of finite predictions in float16 stay below
HIGHEST = 65504.0


@register("agreement")
@dataclass(frozen=True)
class Agreement(ThresholdPolicy):
    """Stop a row when its prediction, a number or a vector, is at most `threshold` away from that of the exit before.

    threshold: distance above 0, one number or one per exit; lower is safer, higher is faster; never fires at the first
    exit, which has nothing before it. distance: "rms" (root of the mean square of the differences), "mean", "max", or
    "cosine" (1 - cosine). outputs: which outputs count, None for all; a gripper's bit is left out so. A trace needs
    `offramp.record(model, data, logits=True)`. Raises `BadArgument`. Paper: DeeR-VLA (arXiv 2411.02359), with rms over
    six outputs of seven.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prediction"})
    safer: ClassVar[str] = "down"
    threshold: float | tuple[float, ...]
    distance: str = "rms"
    outputs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, HIGHEST, "agreement", open_low=True))
        if self.distance not in DISTANCES:
            raise BadArgument(f"agreement: distance {self.distance!r} is not one of {', '.join(DISTANCES)}")
        if self.outputs is None:
            return
        if not isinstance(self.outputs, (list, tuple)) or not self.outputs:
            raise BadArgument(f"agreement: outputs={self.outputs!r} must be a list of places, e.g. [0, 1], or None")
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.outputs):
            raise BadArgument(f"agreement: outputs={list(self.outputs)} must be whole numbers from 0 on")
        object.__setattr__(self, "outputs", tuple(self.outputs))

    def score(self, seen: Evidence) -> Tensor:
        """Return the distance [rows] to `seen.before`; NaN, which never stops a row, where there is none."""
        if seen.prediction is None:
            raise BadArgument("agreement: compares predictions, and this evidence holds none")
        if seen.before is None:
            return seen.every(False) + math.nan
        return self.apart(self.chosen(seen.prediction), self.chosen(seen.before))

    def stops(self, seen: Evidence, threshold: float | Tensor) -> Tensor:
        """Return the mask [rows] of distances up to the threshold; two equal predictions always pass."""
        return self.score(seen) <= threshold

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Compare with the prediction of the exit that was asked before, which the state keeps."""
        stop = self.stops(dataclasses.replace(seen, before=state.get("before")), at_exit(self.threshold, seen.index))
        return stop, {"before": seen.prediction}  # type: ignore[dict-item]  # `score` has refused None

    def chosen(self, prediction: Tensor) -> Tensor:
        """Return the outputs that count [rows, n] in float32; raises `BadArgument` where one is not there."""
        if self.outputs is None:
            return prediction.float()
        if max(self.outputs) >= prediction.shape[-1]:
            raise BadArgument(
                f"agreement: outputs={list(self.outputs)}, and the prediction has {prediction.shape[-1]} (from 0)"
            )
        return torch.stack([prediction[:, i].float() for i in self.outputs], -1)

    def apart(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the distance [rows] between predictions [rows, n]; NaN where either holds one."""
        if self.distance == "cosine":
            return 1 - torch.cosine_similarity(one, other, dim=-1)
        gap = (one - other).abs()
        if self.distance == "rms":
            return gap.square().mean(-1).sqrt()
        return gap.mean(-1) if self.distance == "mean" else gap.amax(-1)

    def check(self, depths: Sequence[int]) -> None:
        """Check one threshold per exit, and that there are two exits to compare."""
        super().check(depths)
        if len(depths) < 2:
            raise BadArgument(
                f"agreement: compares one exit with the one before, and there is only one (at {list(depths)}), so it "
                f"could never fire; attach more exits"
            )

    def grid(self, classes: int) -> Sequence[float]:
        """Return distances from a millionth to a thousand, 20 per power of ten."""
        return [10 ** (step / 20) for step in range(-120, 61)]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return an instance at a distance of 1 unless another threshold is given."""
        return cls(**{"threshold": 1.0, **options})
