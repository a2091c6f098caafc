"""`head_stats` in C++: torch's own products read a weight at a half to a third of what the memory gives."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from offramp.kernels._select import say
from offramp.kernels.cpp import define
from offramp.kernels.head_stats import HeadStats, Lora, Norm, reference

TYPES = (torch.float32, torch.bfloat16)


def head_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, lora: Lora | None,
    softcap: float | None, scale: Tensor | None, needs: Set[str],
) -> HeadStats:  # fmt: skip
    """Compute `offramp.kernels.head_stats`; what changes logits before they are reduced, and other types, by torch."""
    changes = {"bias": bias, "lora": lora, "softcap": softcap, "scale": scale}
    odd = [name for name, given in changes.items() if given is not None]
    if odd or weight.dtype not in TYPES:
        say("head_stats", "cpp", f"it knows no {', '.join(odd) or weight.dtype}")
        return reference(hidden, weight, bias, norm, lora, softcap, scale, needs)
    label, stats = torch.ops.offramp.head_stats(hidden if norm is None else norm(hidden), weight, bool(needs))
    first, second, total, entropy = stats.unbind()
    return HeadStats(
        label, first, second, total if "logsumexp" in needs else None, entropy if "entropy" in needs else None
    )


def _like(hidden: Tensor, weight: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    rows = len(hidden)
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(4, rows, dtype=torch.float32)


define("head_stats(Tensor hidden, Tensor weight, bool sums) -> (Tensor, Tensor)", _like)
