"""Measure ways of generating against each other: warmed, interleaved in one process, in rotating order."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import offramp
from offramp import clock
from offramp.attach import RECORD
from offramp.clock import Timed as Timed
from offramp.clock import interleaved as interleaved
from offramp.clock import quartiles as quartiles
from offramp.enable import Stats, paused

#: arguments of `generate` that let the framework draft by itself
FOREIGN = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")


@dataclass
class Generate:
    """One way to generate from a batch of prompts; a row of the table.

    policy: enabled around every call (outside the clock) with the `enabled` options, None for the model as it is;
    arguments: of `generate`; sample: the temperature to sample at, every call from the same seed, None for greedy.
    Statistics and what the decoding driver learned are kept from call to call, as they are for a user who enables once.
    """

    name: str
    model: Any
    new_tokens: int = 96
    policy: Any = None
    enabled: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sample: float | None = None
    stats: Stats = field(default_factory=Stats)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def foreign(self) -> bool:
        """Whether something other than offramp drafts or skips: offramp does not count in it."""
        return any(name in self.arguments for name in FOREIGN)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Enable the policy while the context lasts."""
        if self.sample is not None:
            torch.manual_seed(0)
        if self.policy is None:
            yield
            return
        with offramp.enable(self.model, self.policy, **self.enabled) as run:
            run.stats, run.memory = self.stats, self.memory
            yield

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the ids [batch, prompt + new] for the prompt ids [batch, prompt]."""
        sampled = {"do_sample": True, "temperature": self.sample, "top_k": 0, "top_p": 1.0}
        found: Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            **({"do_sample": False} if self.sample is None else sampled),
            **self.arguments,
        )
        return found


def rows(
    ways: Sequence[Generate],
    timed: Mapping[str, list[Timed]],
    prompts: Sequence[Tensor],
    depth: int,
    base: str = "generate",
) -> list[dict[str, Any]]:
    """Return one row of plain JSON values per way; speeds are relative to the way called `base`.

    tokens_per_second: all tokens over all seconds; speedup: its ratio to that of `base` (where the texts are identical,
    the ratio of the total times); busy: share of the time inside blocks, heads and readout, that is the speed as a
    share of its bound from the measured times of these; speedup_median and speedup_quartiles: of the ratios prompt by
    prompt; identical: all token ids of all prompts are equal; agreement: share of tokens that the full model chooses
    after the same text. Of sampled text neither says anything: None.
    """
    reference = timed[base]
    batch = prompts[0].shape[0]
    base_made = _made(reference, prompts)
    out = []
    for way in ways:
        mine = timed[way.name]
        made = _made(mine, prompts)
        rates = [n / t.seconds for n, t in zip(made, mine, strict=True)]
        base_rates = [n / t.seconds for n, t in zip(base_made, reference, strict=True)]
        total = sum(made) / sum(t.seconds for t in mine)
        base_total = sum(base_made) / sum(t.seconds for t in reference)
        ratios = [a / b for a, b in zip(rates, base_rates, strict=True)]
        same: bool | None = all(torch.equal(a.result, b.result) for a, b in zip(mine, reference, strict=True))
        agreed = 1.0 if same else None
        if way.sample is not None:
            same = agreed = None
        elif not same:
            agreed = agreement(way.model, [t.result for t in mine], prompts)
        row = {
            "name": way.name,
            "tokens_per_second": total,
            "tokens_per_second_quartiles": quartiles(rates),
            "speedup": total / base_total,
            "speedup_median": statistics.median(ratios),
            "speedup_quartiles": quartiles(ratios),
            "identical": same,
            "agreement": agreed,
            "prompts": len(mine),
            "batch": batch,
            "tokens": sum(made),
        }
        out.append({**row, **counts(way, sum(made), depth, batch)})
        if out[-1].get("bound"):
            out[-1]["of_bound"] = out[-1]["speedup"] / out[-1]["bound"]
        out[-1]["busy"] = way.stats.busy / sum(t.seconds for t in mine) or None
    return out


def _made(timed: Sequence[Timed], prompts: Sequence[Tensor]) -> list[int]:
    """Return how many tokens each call made, over all rows of its batch."""
    return [t.result.numel() - p.numel() for t, p in zip(timed, prompts, strict=True)]


def counts(way: Generate, tokens: int, depth: int, batch: int = 1) -> dict[str, Any]:
    """Return what ran, from the statistics of the run; a way that never exits early runs everything.

    With g = tokens / rounds and L = depth, a round of gamma drafts from an exit at depth E runs L + gamma * E blocks,
    so the bound on the speed is L * g / (L + gamma * E) if nothing but blocks took time. The blocks of a round are
    counted: that is L + gamma * E for one exit, and the right sum for several (draft_depth is E, their mean). Rows of a
    batch share their rounds; all figures are per row.
    """
    stats = way.stats
    if way.foreign:
        return dict.fromkeys(
            ("saved", "accepted", "drafted", "blocks_run", "blocks_full", "rounds", "tokens_per_round", "bound")
        )
    if not stats.blocks_full:
        full = tokens * depth
        body: dict[str, Any] = {"saved": 0.0, "accepted": 0, "drafted": 0, "blocks_run": full, "blocks_full": full}
        return {**body, "rounds": tokens // batch, "tokens_per_round": 1.0, "bound": 1.0, "exits": {str(depth): tokens}}
    rounds = max(1, stats.rounds) * batch
    g, gamma = stats.tokens / rounds, stats.drafted / rounds
    beyond = stats.blocks_run / rounds - depth
    return {
        "saved": stats.saved,
        "accepted": stats.accepted,
        "drafted": stats.drafted,
        "blocks_run": stats.blocks_run,
        "blocks_full": stats.blocks_full,
        "rounds": stats.rounds,
        "tokens_per_round": g,
        "drafted_per_round": gamma,
        "draft_depth": beyond / gamma if gamma else None,
        "bound": depth * g / (depth + beyond),
        "exits": {str(d): n for d, n in sorted(stats.exits.items())},
        "depth_mean": stats.depth_mean,
        "projected": stats.projected,
    }


@torch.no_grad()
def agreement(model: Any, outputs: Sequence[Tensor], prompts: Sequence[Tensor]) -> float:
    """Return the share of generated tokens that the full model chooses after the same text."""
    hits, total = 0, 0
    with paused(model):
        for ids, prompt in zip(outputs, prompts, strict=True):
            start = prompt.shape[1]
            best = model(input_ids=ids).logits[:, start - 1 : -1].argmax(-1)
            hits += int((best == ids[:, start:]).sum())
            total += best.numel()
    return hits / max(total, 1)


def count_blocks(way: Generate, prompts: Sequence[Tensor]) -> dict[str, Any]:
    """Return the block calls of a way that offramp does not drive, counted by hooks in an unmeasured run."""
    blocks = way.model.__dict__[RECORD].backbone.blocks
    calls, tokens = [0], 0

    def one(*args: Any) -> None:
        calls[0] += 1

    handles = [block.register_forward_hook(one) for block in blocks]
    try:
        with way.ready():
            for ids in prompts:
                tokens += way(ids).numel() - ids.numel()
    finally:
        for handle in handles:
            handle.remove()
    full, ran = tokens * len(blocks), calls[0] * prompts[0].shape[0]
    return {"blocks_run": ran, "blocks_full": full, "saved": 1 - ran / full, "counted_on": len(prompts)}


def machine() -> str:
    """Return what the numbers were measured on, in words."""
    return clock.machine("transformers")
