"""What of the time of generation the blocks take, and how much of it the skipped ones would have cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from offramp.clock import BlockClock as BlockClock
from offramp.clock import Clocked as Clocked
from offramp.clock import interleaved
from offramp.clock import sync as sync


def block_share(plain: Any, first: Any, blocks: Sequence[nn.Module], prompts: Sequence[Tensor]) -> float:
    """Return the share of plain generation's time that its blocks take after the prefill.

    plain: the way that generates; first: the same for one token, the prefill. The three ways of measuring take turns,
    and the median over prompts is taken, so that a slow moment of the machine cancels out.
    """
    full, prefill = Clocked(blocks, plain), Clocked(blocks, first)
    timed = interleaved({"generate": plain, "clocked": full, "prefill": prefill}, prompts, warm=1)
    pairs = zip(full.after(0, len(prompts)), prefill.after(0, len(prompts)), timed["generate"], strict=True)
    return statistics.median((a - b) / t.seconds for a, b, t in pairs)


def realised(row: dict[str, Any], share: float) -> float | None:
    """Return time saved over the time that the skipped blocks would have cost; None where none were skipped.

    row: of `measure.rows`; share: of `block_share`. `saved` counts the prefill, which skips nothing, as one token of
    every prompt; above 1 where the loop also saves what the framework spends around its blocks.
    """
    first = row["prompts"] * row["batch"]
    if not row["saved"] or row["saved"] <= 0 or row["tokens"] <= first:
        return None
    ideal = row["saved"] * row["tokens"] / (row["tokens"] - first) * share
    return float((1 - 1 / row["speedup"]) / ideal)
