"""`offramp bench lm --synthetic`: what the machinery costs on a wide model without weights, with an oracle draft."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import offramp
from offramp.attach import find
from offramp.enable import Stats
from offramp.errors import BadArgument
from offramp_hf.bench import Ask, of_settings, origin, run
from offramp_hf.bench_overhead import framework, ours, per_token
from offramp_hf.bench_tables import details
from offramp_hf.demo import SWEEP, step, table
from offramp_hf.measure import Generate
from offramp_hf.settings import Setting, parse_all

#: name -> blocks, width, width of the feed-forward, query heads, key heads, vocabulary
SHAPES = {
    "llama-7b-shape": (32, 4096, 11008, 32, 32, 32000),
    "llama-1b-shape": (16, 2048, 8192, 32, 8, 128256),
}
#: of a shape called BLOCKSxWIDTH: its vocabulary and the width of its heads, four of which share keys
VOCABULARY, HEAD_WIDTH = 32000, 64
#: tokens of a prompt; and how much smaller than at initialisation the blocks' contributions are made
PROMPT, QUIET = 16, 1e-3
#: of a token
PARTS = ("blocks", "heads", "policy", "cache", "rest")


def synthetic(shape: str, exit_at: int, acceptance: float, length: int, ask: Ask, console: Console) -> dict[str, Any]:
    """Measure plain generation, verified oracle drafts of up to `length` tokens from the exit at `exit_at`, and the
    settings of `ask`, on an untrained model.

    Windows, verification, cropping and heads all run as on real weights; only what the drafts say is arranged, so that
    each is right with probability `acceptance`. Raises `BadArgument`.
    """
    setting = {"policy": "fixed", "depth": exit_at, "verify": True, "draft": length}
    given = [Setting.of(setting), *parse_all(ask.settings)]
    new, free = ask.new_tokens or 96, {"eos_token_id": None}
    build = partial(oracle_model, shape, exit_at, acceptance)
    with step(console, f"{shape}: build an untrained model in bf16"):
        model = build().to(ask.device)
    exits, classes = find(model), model.config.vocab_size
    prompts = prompts_of(ask.prompts, ask.batch, new, classes, ask.device)
    plain = Generate("generate", model, new, arguments=free, sample=ask.sample)
    ways = {"generate": plain}
    for name, way in of_settings(given, exits, new).items():
        label = "oracle draft" if len(ways) == 1 else f"oracle draft, {name}"
        ways[label] = replace(way, name=label, arguments=free, sample=ask.sample)
    rows = run(ways, prompts, exits, console, build if ask.memory else None)
    for row in rows:
        row["parts_ms"] = parts(ways[row["name"]], exits, prompts[0])
    title = f"{shape}, untrained, bf16, batch {ask.batch}, {new} tokens, oracle draft at depth {exit_at}"
    console.print(table(title, rows), details("rounds, bound and efficiency", rows), part_table(rows))
    text = torch.cat([p[:, -1:] + 1 + torch.arange(new, device=p.device) for p in prompts]) % classes
    share = known_tokens(classes, acceptance)[text.cpu()].float().mean().item()
    body: dict[str, Any] = {"format": 1, "title": title, "label": "oracle draft", "rows": rows, "asked": asdict(ask)}
    body |= {"acceptance_asked": acceptance, "acceptance": share, **origin(f"offramp bench lm --synthetic {shape}")}
    console.print(f"oracle drafts are right for {share:.1%} of the tokens of this text")
    console.print(f"{body['command']}: {body['machine']}, {body['date']}", soft_wrap=True)
    return body


def shape_of(name: str) -> tuple[int, int, int, int, int, int]:
    """Return (blocks, width, feed-forward, query heads, key heads, vocabulary); raises `BadArgument`."""
    if name in SHAPES:
        return SHAPES[name]
    found = re.fullmatch(r"(\d+)x(\d+)", name)
    blocks, width = map(int, found.groups()) if found else (0, 0)
    if blocks < 2 or width < HEAD_WIDTH or width % HEAD_WIDTH:
        raise BadArgument(
            f"--synthetic {name!r} is no shape; choose one of {', '.join(SHAPES)}, or BLOCKSxWIDTH with a width that "
            f"is a multiple of {HEAD_WIDTH}, e.g. 24x1024"
        )
    heads = width // HEAD_WIDTH
    return blocks, width, round(2.75 * width), heads, heads // 4 if heads % 4 == 0 else heads, VOCABULARY


def oracle_model(shape: str, exit_at: int, acceptance: float) -> Any:
    """Return a bf16 Llama that counts, with an exit that knows its next token with probability `acceptance`.

    Its blocks hardly change the state and its unembedding is the embedding moved by one, so that after token t comes
    t + 1 at any depth, by a margin that rounding in bf16 cannot bridge (an untrained model's own choices are near ties,
    and windows of another length would round to another text). The exit's unembedding is the same, but the rows of
    unknown tokens are exchanged among themselves: a wrong draft costs as much and looks as sure as a right one.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    blocks, width, inner, heads, key_heads, classes = shape_of(shape)
    if not 0 <= acceptance <= 1:
        raise BadArgument(f"--acceptance {acceptance} is no probability; write e.g. --acceptance 0.8")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=classes,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(QUIET)
            block.mlp.down_proj.weight.mul_(QUIET)
        model.lm_head.weight.copy_(model.get_input_embeddings().weight.roll(1, 0))
        exits = offramp.attach(model, [exit_at])
        context = exits.backbone.context()
        oracle = nn.Linear(width, classes, bias=False, dtype=torch.bfloat16)
        oracle.weight.copy_(model.lm_head.weight)
        unknown = (~known_tokens(classes, acceptance)).nonzero()[:, 0]
        oracle.weight[unknown] = oracle.weight[unknown.roll(1)]
    exits[exit_at].oracle = oracle  # moves to the device with the model
    exits[exit_at].share(replace(context, projection=oracle))
    return model


def known_tokens(classes: int, acceptance: float) -> Tensor:
    """Return which tokens the oracle knows, bool [classes]: the same for every way and every run."""
    return torch.rand(classes, generator=torch.Generator().manual_seed(0)) < acceptance


def prompts_of(count: int, batch: int, new_tokens: int, classes: int, device: str) -> list[Tensor]:
    """Return prompts [batch, PROMPT] of the counting model, each at the start of a stretch of its own."""
    starts = torch.arange(count * batch, device=device)[:, None] * (PROMPT + new_tokens)
    return list(((starts + torch.arange(PROMPT, device=device)) % classes).split(batch))


def parts(way: Generate, exits: Any, prompt: Tensor) -> dict[str, float]:
    """Return milliseconds per token after the first by part, measured apart: blocks, heads with the readout, policy,
    cache, and the rest, which is Python around it all."""
    run, first = (replace(way, stats=Stats(), memory={}, new_tokens=n) for n in (way.new_tokens, 1))
    places = framework(way.model, exits) if way.policy is None else ours(way.model, exits, way.policy)
    with run.ready():
        run(prompt)  # what it learns, it has learned
    found = per_token(run, first, prompt, places, way.new_tokens, SWEEP)
    return {name: took / len(prompt) for name, took in found.items()}


def part_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return milliseconds per token and part."""
    out = Table(title="milliseconds per token", title_justify="left", box=SIMPLE)
    names = list(PARTS)
    for name in ("way", *names):
        out.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        out.add_row(row["name"], *(f"{row['parts_ms'].get(name, 0.0):.2f}" for name in names))
    return out
