"""Read another policy's statistics from predictions whose temperature was calibrated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offramp._registry import create, register
from offramp.errors import BadArgument
from offramp.kernels.confidence import PREDICTION, confidence
from offramp.policies._wrapping import Wrapping, wrapped
from offramp.policy import Evidence, ExitPolicy, State, at_exit


@register("tempered")
@dataclass(frozen=True)
class Tempered(Wrapping):
    """Give `inner` the statistics of softmax(logits / temperature) in place of those of softmax(logits).

    inner: a policy or its config; temperature: above 0, one number or one per exit; higher flattens probabilities, so
    it is safer under confidence, margin and entropy, and slower. Labels stay. Needs the logits, which a fused kernel
    then has to write. Raises `BadArgument`. Paper: Guo et al., On Calibration of Modern Neural Networks (ICML 2017).
    """

    temperature: float | tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", wrapped(self.inner, "tempered"))
        if self.inner.learns():
            raise BadArgument(
                f"tempered: {type(self.inner).__name__} learns from statistics at temperature 1; use it by itself: "
                f"{self.inner.config()}"
            )
        several = isinstance(self.temperature, (list, tuple))
        values: Any = self.temperature if several else (self.temperature,)
        if not values:
            raise BadArgument("tempered: temperature is an empty list; give one number, or one per exit")
        for t in values:
            if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 < t < math.inf:
                raise BadArgument(f"tempered: temperature {t!r} is not a number above 0")
        object.__setattr__(self, "temperature", tuple(map(float, values)) if several else float(values[0]))

    def statistics(self) -> frozenset[str]:
        """Return the logits in place of the wrapped policy's statistics of them."""
        return (self.inner.statistics() - PREDICTION) | {"prediction", "label"}

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Recompute the statistics at this exit's temperature and step the wrapped policy on them."""
        if seen.prediction is None:
            raise BadArgument("tempered needs the logits of the exit, and this evidence has none")
        cooler = seen.prediction.float() / at_exit(self.temperature, seen.index)
        stats = {**seen.stats, **confidence(cooler, self.inner.statistics() & PREDICTION)}
        return self.inner.step(state, dataclasses.replace(seen, prediction=cooler, stats=stats))

    def check(self, depths: Sequence[int]) -> None:
        """Check the wrapped policy, and that there is one temperature per exit."""
        super().check(depths)
        if isinstance(self.temperature, tuple) and len(self.temperature) != len(depths):
            raise BadArgument(
                f"tempered was given {len(self.temperature)} temperatures for {len(depths)} exits "
                f"(at {list(depths)}); give one number, or one per exit"
            )

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return confidence 0.5 at temperature 2 unless told otherwise."""
        return cls(**{"inner": create(ExitPolicy, "confidence", threshold=0.5), "temperature": 2.0, **options})
