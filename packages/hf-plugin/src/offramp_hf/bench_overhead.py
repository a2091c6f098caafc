"""The decoder's rows of `offramp bench overhead`: what a token costs outside blocks and heads, and in `generate`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import offramp
from offramp.bench_overhead import Place, breakdown, row
from offramp.clock import Clocked, interleaved
from offramp_hf.backbones._calls import Given
from offramp_hf.backbones._replay import Replay
from offramp_hf.bench_shapes import PROMPT, wide_model
from offramp_hf.cache import GrowingLayer, WindowCache
from offramp_hf.decode.answers import Answers
from offramp_hf.decode.direct import Direct
from offramp_hf.decode.driver import Driver
from offramp_hf.measure import Generate

#: the shape that overhead is promised for
BLOCKS, WIDTH = 24, 1024
TOKENS = 17


def decode(repeats: int, blocks: int = BLOCKS, width: int = WIDTH, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Return rows of a random bf16 Llama, one text, milliseconds per token after the first, which the prefill gives.

    An exit at half of the blocks: all tokens leave there; none does, and is asked all the same. Overhead is all that
    runs outside blocks, heads and readout; in plain `generate` it is the framework's own.
    """
    model, half = wide_model(width, blocks), blocks // 2
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    with offramp.attach(model, [half]) as exits:
        plain = _way(model, "generate", tokens)
        first = _way(model, "prefill", 1)
        cases = {
            "all at half": _way(model, "early", tokens, offramp.policy("fixed", depth=half)),
            "asked, none leaves": _way(model, "asked", tokens, offramp.policy("confidence", threshold=1.0)),
        }
        full, prefill = Clocked(exits.backbone.blocks, plain), Clocked(exits.backbone.blocks, first)  # type: ignore[attr-defined]
        ways: dict[str, Any] = {"generate": plain, "first": first, "clocked": full, "prefill": prefill, **cases}
        timed = interleaved(ways, [ids] * repeats, warm=1)
        middle = {name: statistics.median(t.seconds for t in taken) for name, taken in timed.items()}
        skipped = statistics.median(
            a - b for a, b in zip(full.after(0, repeats), prefill.after(0, repeats), strict=True)
        )
        of_full = per_token(plain, first, ids, framework(model, exits), tokens, repeats)
        rows = []
        for name, way in cases.items():
            start = _way(model, "prefill", 1, way.policy)
            parts = per_token(way, start, ids, ours(model, exits, way.policy), tokens, repeats)
            took, whole = ((middle[n] - middle["first"]) / (tokens - 1) for n in (name, "generate"))
            saved = 1 - (1 - way.stats.saved) * tokens / (tokens - 1) + 1 / (tokens - 1)  # without the prefill
            rows.append(row("decode", name, whole, took, skipped / (tokens - 1) * saved, saved, parts, of_full))
    return rows


def _way(model: Any, name: str, tokens: int, policy: Any = None) -> Generate:
    return Generate(name, model, tokens, policy, arguments={"eos_token_id": None})


def per_token(
    way: Generate, first: Callable[[Any], Any], ids: torch.Tensor, places: list[Place], tokens: int, repeats: int
) -> dict[str, float]:
    """Return milliseconds of a token by part: of `tokens` less those of the first, which `first` makes alone."""
    whole, alone = breakdown(way, ids, places, repeats), breakdown(first, ids, places, repeats)
    return {name: max(0.0, took - alone.get(name, 0.0)) / (tokens - 1) for name, took in whole.items()}


def framework(model: Any, exits: Any) -> list[Place]:
    """Return where plain generation spends its time; its norm before the readout is a head's, as it is here."""
    from transformers.cache_utils import DynamicLayer

    places: list[Place] = [("blocks", block, "forward") for block in exits.backbone.blocks]
    context = exits.backbone.context()
    places += [("heads", part, "forward") for part in (context.norm, context.projection)]
    return [*places, ("cache", DynamicLayer, "update")]


def ours(model: Any, exits: Any, policy: Any) -> list[Place]:
    """Return where the windowed decoder spends its time. The blocks themselves carry no timer: the recordings of a part
    that somebody patched are not used."""
    places: list[Place] = [("blocks", Direct, "run")]
    places += [("heads", Answers, name) for name in ("look", "predict", "readout")]
    places += [("heads", type(exits.backbone.context()), "readout"), ("policy", type(policy), "step")]
    places += [("cache", GrowingLayer, name) for name in ("update", "room", "crop_to", "gather")]
    places += [("rest", Given, "of"), ("rest", Replay, "ready")]  # between blocks, not in them
    return [*places, ("cache", WindowCache, "crop_to"), ("cache", Driver, "keep")]
