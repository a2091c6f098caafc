"""Exit as soon as one of several policies says so."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offramp._registry import register
from offramp.policies._combined import Combined
from offramp.policy import ExitPolicy


@register("any_of")
@dataclass(frozen=True)
class AnyOf(Combined):
    """Stop a row when at least one of `policies` would stop it: faster and less safe than each of them.

    policies: a non-empty list of policies or their configs, `[{"policy": "confidence", "threshold": 0.9}, ...]`; all of
    them see every exit. Raises `BadArgument`.
    """

    policies: tuple[ExitPolicy, ...]

    def combine(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the mask [rows] of both together."""
        return one | other
