"""Measure what early exit costs itself: realised over ideal saving of the single-pass executor, and where time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import offramp
from offramp.bench_kernels import machine
from offramp.clock import Clocked, Early, interleaved
from offramp.testing.toy import ToyModel, toy_plugin


class Clock:
    """Seconds spent in named parts; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.inner = 0.0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed as `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self.inner, start = self.inner, 0.0, time.perf_counter()
            out = function(*args, **kwargs)
            took = time.perf_counter() - start
            self.spent[name] = self.spent.get(name, 0.0) + took - self.inner
            self.inner = before + took
            return out

        return timed


class Timed:
    """A policy whose steps are timed; everything else is the policy's own."""

    def __init__(self, policy: offramp.ExitPolicy, clock: Clock) -> None:
        self.policy, self.step = policy, clock.wrap("policy", policy.step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


def single_pass(depth: int, width: int, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Return the table of a classifier of `depth` blocks whose rows leave at a quarter, half and three quarters.

    realised: time saved over the time that the skipped blocks take in the full model; parts: seconds of one call in
    blocks, heads and policy, and "rest": compaction, answers and Python. Rows of the first kind all leave at half of
    the depth, those of the second one by one where thresholds say: the medians of what is left.
    """
    torch.manual_seed(0)
    model = ToyModel(depth, width, classes=100, inputs=width).eval()
    x = torch.randn(batch, tokens, width)
    table = []
    with torch.no_grad(), toy_plugin():
        exits = offramp.attach(model, at=[depth // 4, depth // 2, 3 * depth // 4], head="linear")
        top = offramp.record(model, x).stats["top1"]
        spread = [float(top[:, k].quantile(0.7)) for k in range(len(exits.at))]
        for name, policy in (
            ("all at half", offramp.policy("fixed", depth=depth // 2)),
            ("spread", offramp.policy("confidence", threshold=spread)),
        ):
            table.append({"case": name, **_case(model, exits, policy, x, repeats)})
    shape = {"depth": depth, "width": width, "batch": batch, "tokens": tokens}
    about = {**machine("cpu", "offramp bench overhead"), "executor": "single_pass", **shape}
    return {**about, "repeats": repeats, "rows": table}


def _case(
    model: ToyModel, exits: offramp.Exits, policy: offramp.ExitPolicy, x: torch.Tensor, repeats: int
) -> dict[str, Any]:
    full, early = Clocked(list(model.blocks), model), Early(model, policy)
    timed = interleaved({"full": model, "clocked": full, "early": early}, [x] * repeats, warm=1)
    whole, took = (statistics.median(t.seconds for t in timed[name]) for name in ("full", "early"))
    blocks = statistics.median(full.after(0, repeats))
    clock = Clock()
    with timed_parts(model, exits, clock), offramp.enable(model, policy) as run:
        run.policy = Timed(policy, clock)  # type: ignore[assignment]
        clock.wrap("rest", model)(x)
    ideal = blocks * run.stats.saved
    return {
        "full_ms": whole * 1e3,
        "early_ms": took * 1e3,
        "saved_blocks": run.stats.saved,
        "realised": (whole - took) / ideal if ideal else None,
        "parts_ms": {name: value * 1e3 for name, value in sorted(clock.spent.items())},
    }


@contextmanager
def timed_parts(model: ToyModel, exits: offramp.Exits, clock: Clock) -> Iterator[None]:
    """Time blocks and heads while the context lasts."""
    parts: list[tuple[str, nn.Module]] = [("blocks", block) for block in model.blocks]
    parts += [("heads", exits[depth]) for depth in exits.at]
    for name, module in parts:
        module.__dict__["forward"] = clock.wrap(name, module.forward)
    try:
        yield
    finally:
        for _, module in parts:
            module.__dict__.pop("forward", None)
