"""The denoiser's rows of `offramp bench overhead`: what a call costs outside its blocks when it stops early."""

from __future__ import annotations

import statistics
from typing import Any

import torch

import offramp
from offramp.bench_overhead import Place, breakdown, row
from offramp.clock import Clocked, Early, interleaved
from offramp.compiled import compile_blocks
from offramp_diffusers.bench import DEPTH, SHAPES, STOP
from offramp_diffusers.policies.time_schedule import TimeSchedule


def denoise(repeats: int, compiled: bool, width: int = 384, side: int = 32) -> list[dict[str, Any]]:
    """Return rows of a random DiT whose call stops at half of its blocks: by the clock of the noise, and at an exit
    where the policy is asked. compiled: both also with compiled blocks, in the full model too.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model, given = SHAPES["dit"](width, side, DEPTH)
        offramp.attach(model.eval(), at=[STOP], head="passthrough")
        cases = {"by schedule": TimeSchedule((STOP,)), "at an exit": offramp.policy("fixed", depth=STOP)}
        return [
            _case(name, model, given, policy, repeats, compile)
            for compile in (False, True)[: 1 + compiled]
            for name, policy in cases.items()
        ]


def _case(
    name: str, model: Any, given: dict[str, Any], policy: offramp.ExitPolicy, repeats: int, compile: bool
) -> dict[str, Any]:
    blocks = list(model.transformer_blocks)
    undo = compile_blocks(blocks) if compile else None

    def whole(item: dict[str, Any]) -> Any:
        return model(**item)

    full, early = Clocked(blocks, whole), Early(model, policy)
    timed = interleaved({"full": whole, "clocked": full, "early": early}, [given] * repeats, warm=1)
    seconds, took = (statistics.median(t.seconds for t in timed[way]) for way in ("full", "early"))
    ideal = statistics.median(full.after(0, repeats)) * early.stats.saved
    places: list[Place] = [("blocks", block, "forward") for block in blocks]
    of_full = breakdown(whole, given, places, repeats)
    step = "windows" if isinstance(policy, TimeSchedule) else "step"
    of_early = breakdown(early, given, [*places, ("policy", type(policy), step)], repeats)
    if undo is not None:
        undo()
    return row("denoise", name, seconds, took, ideal, early.stats.saved, of_early, of_full, compile)
