"""Clocks on blocks: where the time of a call goes, and how much of it the skipped blocks would have cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def sync() -> None:
    """Wait for the accelerator, when this process uses one: its work is over later than the call that asked for it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class BlockClock:
    """Seconds spent in each block, summed over calls, while the context lasts."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.seconds = [0.0] * len(blocks)
        self.started = 0.0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put a hook before and after each block."""
        handles = []
        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self.start))
            handles.append(block.register_forward_hook(self.stopper(i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, *args: Any) -> None:
        """Start the clock of the block that is called."""
        sync()
        self.started = time.perf_counter()

    def stopper(self, index: int) -> Callable[..., None]:
        """Return the hook that stops the clock of block `index`."""

        def stop(*args: Any) -> None:
            sync()
            self.seconds[index] += time.perf_counter() - self.started

        return stop


class Clocked(BlockClock):
    """A way that runs `call` with the clock on; keeps seconds per block of every call."""

    def __init__(self, blocks: Sequence[nn.Module], call: Callable[[Any], Any]) -> None:
        super().__init__(blocks)
        self.call = call
        self.kept: list[list[float]] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Get `call` ready too, where it can be."""
        with getattr(self.call, "ready", nullcontext)(), super().ready():
            yield

    def __call__(self, item: Any) -> Any:
        """Run once."""
        self.seconds = [0.0] * len(self.blocks)
        result = self.call(item)
        self.kept.append(self.seconds)
        return result

    def after(self, start: int, last: int) -> list[float]:
        """Return the seconds that blocks `start` and deeper took, for each of the last calls."""
        return [sum(one[start:]) for one in self.kept[-last:]]


def block_share(plain: Any, first: Any, blocks: Sequence[nn.Module], prompts: Sequence[Tensor]) -> float:
    """Return the share of plain generation's time that its blocks take after the prefill.

    plain: the way that generates; first: the same for one token, the prefill. The three ways of measuring take turns,
    and the median over prompts is taken, so that a slow moment of the machine cancels out.
    """
    from offramp_hf.measure import interleaved

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
