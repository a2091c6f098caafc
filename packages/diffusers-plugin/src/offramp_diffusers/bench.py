"""`offramp bench diffusion`: what skipping costs itself, and how much of the ideal saving is saved, by shape."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from offramp.clock import Timed, interleaved, one_thread, origin
from offramp.enable import enable
from offramp.errors import BadArgument
from offramp_diffusers.facts import model_facts
from offramp_diffusers.policies.time_schedule import TimeSchedule

#: blocks of every shape, and after how many it leaves
DEPTH, STOP = 6, 3


def _dit(width: int, side: int, depth: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, num_layers=depth, sample_size=side,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, side, side), "timestep": torch.tensor([900]),
        "class_labels": torch.tensor([1]),
    }  # fmt: skip


def _pixart(width: int, side: int, depth: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=depth,
        sample_size=side, patch_size=2, cross_attention_dim=width, caption_channels=64, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, side, side), "encoder_hidden_states": torch.randn(1, 16, 64),
        "timestep": torch.tensor([900]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def _sd3(width: int, side: int, depth: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=side, patch_size=2, in_channels=4, num_layers=depth, attention_head_dim=64,
        num_attention_heads=width // 64, joint_attention_dim=64, caption_projection_dim=width,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=side,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, side, side), "encoder_hidden_states": torch.randn(1, 16, 64),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([900.0]),
    }  # fmt: skip


def _flux(width: int, side: int, depth: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=depth // 3, num_single_layers=depth - depth // 3,
        attention_head_dim=64, num_attention_heads=width // 64, joint_attention_dim=64, pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    tokens = (side // 2) ** 2
    return model, {
        "hidden_states": torch.randn(1, tokens, 16), "encoder_hidden_states": torch.randn(1, 16, 64),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([0.9]), "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(16, 3),
    }  # fmt: skip


SHAPES: dict[str, Callable[[int, int, int], tuple[nn.Module, dict[str, Any]]]] = {
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
}


@one_thread()
def run(shapes: Sequence[str] = (), rounds: int = 25, width: int = 384, side: int = 32) -> dict[str, Any]:
    """Return the JSON of the bench: one row per shape. Raises `BadArgument` for a shape that is not known."""
    chosen = list(shapes) or list(SHAPES)
    if unknown := [s for s in chosen if s not in SHAPES]:
        raise BadArgument(f"no shape is called {', '.join(unknown)}; known: {', '.join(SHAPES)}")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        rows = [{"name": name, **realised(name, rounds, width, side)} for name in chosen]
        overhead, idle = skip_cost(rounds), idle_cost(rounds)
    command = "offramp bench diffusion" + "".join(f" --shape {name}" for name in chosen) + f" --rounds {rounds}"
    return {"format": 1, **origin(command, "diffusers"), "overhead_us": overhead, "idle_us": idle, "rows": rows}


def realised(name: str, rounds: int, width: int, side: int) -> dict[str, float]:
    """Return seconds of the full, the early and the shortened model, and realised / ideal.

    Ideal is what a model whose lists hold only the first STOP blocks saves. All ways run in turns, in two halves.
    """
    model, given = SHAPES[name](width, side, DEPTH)
    model.eval()
    copies = [model, *(copy.deepcopy(model) for _ in range(3))]
    halves = []
    # each on a copy of its own, enabled once: the first call after `enable` finds nothing in the processor's caches;
    # and two copies of one model differ by up to 1.2 % with nothing enabled, by where they lie in memory, so those that
    # are compared change places
    for full, never, early, third in (copies, [copies[i] for i in (1, 0, 3, 2)]):
        short = cut(third, STOP)
        parts = {"full": full, "early": early, "short": short, "never": never}
        ways: dict[str, Callable[[Any], Any]] = {way: partial(_call, part) for way, part in parts.items()}
        with enable(early, TimeSchedule((STOP,))), enable(never, TimeSchedule((1.0,))):
            half = _medians(interleaved(ways, [given] * -(-rounds // 2), warm=1))
            # a difference of 0.3 % takes more turns to see than one of 50 %: 18 of them were off by 0.7 %
            pair = {way: ways[way] for way in ("full", "never")}
            half["never saved"] = _medians(interleaved(pair, [given] * 2 * rounds, warm=1))["never saved"]
            halves.append(half)
    mean = {key: statistics.mean(half[key] for half in halves) for key in halves[0]}
    return {
        **{f"{way}_ms": mean[way] * 1e3 for way in ("full", "early", "short")},
        "block_ms": mean["short saved"] * 1e3 / STOP, "realised": mean["early saved"] / mean["short saved"],
        "never": 1 - mean["never saved"] / mean["full"],
    }  # fmt: skip


def _medians(timed: dict[str, list[Timed]]) -> dict[str, float]:
    """Return seconds of every way, and what it saves within a turn: both calls of one see the same machine."""
    seconds = {way: [t.seconds for t in found] for way, found in timed.items()}
    saved = {
        f"{way} saved": statistics.median(a - b for a, b in zip(seconds["full"], found, strict=True))
        for way, found in seconds.items()
    }
    return {way: statistics.median(found) for way, found in seconds.items()} | saved


def skip_cost(rounds: int) -> float:
    """Return microseconds that one skipped block costs: a narrow model of many blocks against a short one."""
    depth, stop = 60, 2
    model, given = _dit(64, 8, depth)
    model.eval()
    short = cut(model, stop)
    ways = {"early": partial(_call, model), "short": partial(_call, short)}
    with enable(model, TimeSchedule((stop,))):
        timed = interleaved(ways, [given] * (20 * rounds), warm=1)
    differences = [a.seconds - b.seconds for a, b in zip(timed["early"], timed["short"], strict=True)]
    return statistics.median(differences) / (depth - stop) * 1e6


def idle_cost(rounds: int) -> float:
    """Return microseconds that a schedule costs a call where it skips nothing: a narrow model, with it and without."""
    model, given = _dit(64, 8, DEPTH)
    model.eval()
    other, found = copy.deepcopy(model), []
    for plain, never in ((model, other), (other, model)):  # as above: copies differ by where they lie
        with enable(never, TimeSchedule((1.0,))):
            ways = {"never": partial(_call, never), "full": partial(_call, plain)}
            found.append(_medians(interleaved(ways, [given] * (10 * rounds), warm=1))["never saved"])
    return -statistics.mean(found) * 1e6


def _call(model: nn.Module, given: dict[str, Any]) -> Any:
    return model(**given)


def cut(model: nn.Module, depth: int) -> nn.Module:
    """Return a copy on the same weights, whose lists of blocks hold only the first `depth` blocks."""
    short = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for name in model_facts(model).lists:
        blocks = list(getattr(short, name))
        setattr(short, name, nn.ModuleList(blocks[: max(0, depth)]))
        depth -= len(blocks)
    return short
