"""What a language model does to its logits after the projection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Finish:
    """What a model does to its logits after the projection: nothing, a scale, or a soft cap."""

    def __init__(self, scale: float = 1.0, cap: float | None = None) -> None:
        self.scale, self.cap = scale, cap

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the finished logits, same shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @classmethod
    def candidates(cls, config: Any) -> Iterator[Finish]:
        """Yield what the config allows, the plainest last; which one it is, a probe decides."""
        if getattr(config, "final_logit_softcapping", None):
            yield cls(cap=config.final_logit_softcapping)
        for name, power in (("logit_scale", 1), ("logits_scaling", -1)):
            if getattr(config, name, None):
                yield cls(scale=float(getattr(config, name)) ** power)
        yield cls()
