"""`head_stats` in C++: torch's own products read a weight at a half to a third of what the memory gives."""

from __future__ import annotations

import ctypes
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from offramp.kernels._select import say
from offramp.kernels.cpp._build import library
from offramp.kernels.head_stats import HeadStats, Lora, Norm, reference

#: the function for each type of weight
NAMES = {torch.float32: "head_stats_float32", torch.bfloat16: "head_stats_bfloat16"}
TYPES = (*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 4, ctypes.c_bool, ctypes.c_int)


def head_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, lora: Lora | None,
    softcap: float | None, scale: Tensor | None, needs: Set[str],
) -> HeadStats:  # fmt: skip
    """Compute `offramp.kernels.head_stats`; what changes logits before they are reduced, and other types, by torch."""
    changes = {"bias": bias, "lora": lora, "softcap": softcap, "scale": scale}
    odd = [name for name, given in changes.items() if given is not None]
    if odd or weight.dtype not in NAMES:
        say("head_stats", "cpp", f"it knows no {', '.join(odd) or weight.dtype}")
        return reference(hidden, weight, bias, norm, lora, softcap, scale, needs)
    label, stats = torch.ops.offramp.head_stats(hidden if norm is None else norm(hidden), weight, bool(needs))
    first, second, total, entropy = stats.unbind()
    return HeadStats(
        label, first, second, total if "logsumexp" in needs else None, entropy if "entropy" in needs else None
    )


def _run(hidden: Tensor, weight: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()
    label, stats = _empty(hidden, weight, sums)
    run: Any = getattr(library("head_stats"), NAMES[weight.dtype])
    run.argtypes, run.restype = TYPES, None
    pointers = [t.data_ptr() for t in (weight, hidden, label, stats)]
    run(*pointers, *hidden.shape, weight.stride(0), len(weight), sums, torch.get_num_threads())
    return label, stats


def _empty(hidden: Tensor, weight: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    rows = len(hidden)
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(4, rows, dtype=torch.float32)


# an operator of torch's, so that recordings and compiled graphs hold the call, and not what it once gave
_LIBRARY = torch.library.Library("offramp", "FRAGMENT")
_LIBRARY.define("head_stats(Tensor hidden, Tensor weight, bool sums) -> (Tensor, Tensor)")
_LIBRARY.impl("head_stats", _run, "CPU")
torch.library.register_fake("offramp::head_stats", _empty)
