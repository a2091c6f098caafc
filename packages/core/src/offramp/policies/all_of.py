"""Exit only when several policies agree."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offramp._registry import register
from offramp.policies._combined import Combined
from offramp.policy import ExitPolicy


@register("all_of")
@dataclass(frozen=True)
class AllOf(Combined):
    """Stop a row when every one of `policies` would stop it: slower and safer than each of them.

    policies: a non-empty list of policies or their configs, `[{"policy": "confidence", "threshold": 0.9}, ...]`; all of
    them see every exit. Raises `BadArgument`.
    """

    policies: tuple[ExitPolicy, ...]

    def combine(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the mask [rows] of both together."""
        return one & other
