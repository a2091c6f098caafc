"""Exit when several heads in a row say the same."""

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
from offramp.policy import Evidence, ExitPolicy, State


@register("patience")
@dataclass(frozen=True)
class Patience(ExitPolicy):
    """Stop a row when its answer has stayed the same over `patience` steps from exit to exit.

    patience: a whole number >= 1, counted in exits, not blocks; higher is safer, lower is faster. The earliest exit
    that can stop is the one with index `patience`, so it must be less than the number of exits. tolerance: None for
    classes; for heads that predict numbers, how much every output may change and still count as the same (a trace then
    needs `offramp.record(model, data, logits=True)`). Raises `BadArgument`. Paper: PABEE (Zhou et al., NeurIPS 2020),
    with a counter per row instead of one for the batch; for numbers between 0 and 5 it suggests 0.1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"label"})
    patience: int
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise BadArgument(
                f"patience: patience must be a whole number of exits, at least 1, not {self.patience!r}. "
                f'To never exit, write offramp.enable(model, "never")'
            )

        if self.tolerance is None:
            return
        number = isinstance(self.tolerance, (int, float)) and not isinstance(self.tolerance, bool)
        if not number or not 0 < self.tolerance < math.inf:
            raise BadArgument(
                f"patience: tolerance must be a change above 0 that still counts as none, e.g. 0.1, or None for "
                f"classes, not {self.tolerance!r}"
            )

    def statistics(self) -> frozenset[str]:
        """Return the label, or for numbers the prediction itself."""
        return self.needs if self.tolerance is None else frozenset({"prediction"})

    def start(self, batch: int, device: torch.device | str) -> State:
        """Return counters at 0 and no previous answer (-1; none at all for numbers)."""
        count = {"count": torch.zeros(batch, dtype=torch.int64, device=device)}
        if self.tolerance is not None:
            return count
        return {**count, "label": torch.full((batch,), -1, dtype=torch.int64, device=device)}

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Count agreement with the previous exit; an answer read from NaN agrees with nothing, before or after it."""
        if self.tolerance is not None:
            return self.close(state, seen, self.tolerance)
        label = seen["label"]
        known = _known(seen, label)
        same = (label == state["label"]) & known
        count = torch.where(same, state["count"] + 1, 0)
        # >= and not ==: under `at_least` the counter passes `patience` before the row is allowed to stop
        return count >= self.patience, {"label": torch.where(known, label, -1), "count": count}

    def close(self, state: State, seen: Evidence, tolerance: float) -> tuple[Tensor, State]:
        """Count exits whose outputs all moved by less than `tolerance`."""
        now = seen.prediction
        if now is None:
            raise BadArgument("patience: tolerance compares predictions, and this evidence holds none")
        if "before" not in state:
            return seen.every(False), {**state, "before": now}
        same = ((now.float() - state["before"].float()).abs() < tolerance).all(-1)
        count = torch.where(same, state["count"] + 1, 0)
        return count >= self.patience, {"count": count, "before": now}

    def check(self, depths: Sequence[int]) -> None:
        """Refuse a patience that these exits can never reach."""
        if self.patience >= len(depths):
            raise BadArgument(
                f"patience: {self.patience} equal answers in a row after the first need at least {self.patience + 1} "
                f"exits, and there are {len(depths)} (at {list(depths)}), so it could never fire; attach more exits"
                + (f" or use at most {len(depths) - 1}" if len(depths) > 1 else "")
            )

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return every patience that can fire, longest first; raises `BadArgument` for a single exit."""
        Patience(1).check(depths)
        return [dataclasses.replace(self, patience=p) for p in range(len(depths) - 1, 0, -1)]

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return patience 1 unless another is given."""
        return cls(**{"patience": 1, **options})


def _known(seen: Evidence, label: Tensor) -> Tensor:
    # argmax returns the place of a NaN when there is one, so looking at that one value is enough
    if seen.prediction is not None:
        return seen.prediction.gather(-1, label.unsqueeze(-1)).squeeze(-1).isfinite()
    return seen["top1"].isfinite() if "top1" in seen.stats else label >= 0
