"""Exit when a tiny predictor says so and the full head confirms it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp._registry import register
from offramp.errors import BadArgument
from offramp.kernels.subset_logits import among
from offramp.policy import UNIT_GRID, Evidence, ExitPolicy, State, at_exit, thresholds


@register("speculative_gate")
@dataclass(frozen=True)
class SpeculativeGate(ExitPolicy):
    """Stop a row when the gate of a `speculative` head is above `threshold` and the head's answer is a candidate.

    threshold: probability in [0, 1[, one number or one per exit; higher is safer, lower is faster. The whole head runs
    only once the gate is above it; an answer outside the row's candidates does not stop the row. layers: depths whose
    gates are asked, None for all; online=True: also those within `reach` blocks of the depths at which the row's last
    `recent` tokens stopped. A depth that is not asked costs nothing. Raises `BadArgument`. Paper: SpecEE (arXiv
    2504.08850), with 0.5, recent 5, reach 2.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    safer: ClassVar[str] = "up"
    threshold: float | tuple[float, ...] = 0.5
    layers: tuple[int, ...] | None = None
    online: bool = False
    recent: int = 5
    reach: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", thresholds(self.threshold, 0.0, 1.0, "speculative_gate"))
        if 1.0 in (self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)):
            raise BadArgument(
                "speculative_gate: threshold 1 is outside [0, 1[; no gate is above it. To never exit, write "
                'offramp.enable(model, "never")'
            )
        if not isinstance(self.online, bool):
            raise BadArgument(f"speculative_gate: online={self.online!r} must be True or False")
        for name in ("recent", "reach"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name == "recent"):
                raise BadArgument(f"speculative_gate: {name}={value!r} must be a whole number, e.g. recent=5, reach=2")
        if self.layers is None:
            if self.online:
                raise BadArgument("speculative_gate: online=True adds to layers=; without layers every exit is asked")
            return
        if not isinstance(self.layers, (list, tuple)) or not self.layers:
            raise BadArgument(f"speculative_gate: layers={self.layers!r} must be a list of depths, or None for all")
        object.__setattr__(self, "layers", tuple(self.layers))

    def check(self, depths: Sequence[int]) -> None:
        """Check one threshold per exit, and that every layer is an exit."""
        super().check(depths)
        odd = [depth for depth in self.layers or () if depth not in depths]
        if odd:
            raise BadArgument(f"speculative_gate: layers {odd} are no exits; exits are at {list(depths)}")

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Ask this exit's gate for the rows that are scheduled; the candidates are drafted at the first exit."""
        threshold = at_exit(self.threshold, seen.index)
        if "gate" in seen.stats:
            if self.layers is not None:
                raise BadArgument(
                    "speculative_gate: a trace holds what gates say when every exit is asked, and with layers= they "
                    "see another exit before them; simulate without layers and online, or attach exits at "
                    f"{list(self.layers)} alone and record those"
                )
            return seen["gate"] > threshold, state
        if not state:
            state = seen.head.draft(seen.hidden, seen.prediction)
        asked = self.asked(seen)
        if not any(asked):
            return seen.every(False), state
        logit, p = seen.head.gate(seen.hidden, state["candidates"], state["p"])
        stop = logit.sigmoid() > threshold
        if not all(asked):
            mask = torch.tensor(asked, device=stop.device)
            stop, p = stop & mask, torch.where(mask[:, None], p, state["p"])
        return stop, {**state, "p": p}

    def asked(self, seen: Evidence) -> list[bool]:
        """Return which rows ask this exit, or one value for all of them; known on the host, so nothing waits."""
        if self.layers is None or seen.depth in self.layers:
            return [True]
        if not self.online:
            return [False]
        if seen.recent is None:
            raise BadArgument(
                "speculative_gate: online=True follows the tokens of a text that is generated, and here is none; "
                "leave online out"
            )
        return [any(abs(d - seen.depth) <= self.reach for d in row[-self.recent :]) for row in seen.recent]

    def confirm(self, state: State, prediction: Tensor) -> Tensor:
        """Return the rows whose answer is one of their candidates."""
        return among(prediction, state["candidates"])

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return this policy at every threshold below 1 of the common grid, the same for all exits."""
        return [dataclasses.replace(self, threshold=t) for t in UNIT_GRID[1:]]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return the paper's threshold unless another is given."""
        return cls(**options)
