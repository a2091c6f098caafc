"""`offramp bench wide` and `offramp bench encoder`: time saved over what the skipped blocks would have cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import offramp
from offramp.clock import Clocked, Early, Timed, interleaved, quartiles
from offramp.policy import Evidence, ExitPolicy, State
from offramp_hf.bench import origin
from offramp_hf.measure import Generate

#: tokens of the prompt of `wide`: few, so that decoding is what is measured
PROMPT = 16
#: exits of the 12-block encoder
ENCODER_AT = (2, 5, 8, 11)


def wide(width: int, blocks: int, new_tokens: int, repeats: int, console: Console) -> dict[str, Any]:
    """Measure `fixed` exits at a quarter, half and three quarters of a bf16 Llama of this shape, lossy, batch 1.

    ideal: the measured time of the skipped blocks while decoding (all tokens after the first, which the prefill gives);
    realised: plain time minus early time, over ideal; above 1 where the windowed loop also saves what the framework
    spends around its blocks. One row per exit and way of supplying deeper keys and values.
    """
    model, at = wide_model(width, blocks), [round(blocks * f) for f in (0.25, 0.5, 0.75)]
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    with offramp.attach(model, at) as exits:
        free = {"eos_token_id": None}
        plain = Generate("generate", model, new_tokens, arguments=free)
        first = Generate("prefill", model, 1, arguments=free)
        full, prefill = Clocked(exits.backbone.blocks, plain), Clocked(exits.backbone.blocks, first)  # type: ignore[attr-defined]
        ways: dict[str, Any] = {"generate": plain, "clocked": full, "prefill": prefill}
        for depth in at:
            for kv in ("catch_up", "propagate"):
                policy = offramp.policy("fixed", depth=depth)
                name = f"fixed {depth} {kv}"
                ways[name] = Generate(name, model, new_tokens, policy, {"kv": kv}, arguments=free)
        timed = interleaved(ways, [ids] * repeats, warm=1)
    rows = []
    for name in list(ways)[3:]:
        depth = int(name.split()[1])
        both = zip(full.after(depth, repeats), prefill.after(depth, repeats), strict=True)
        rows.append(_row(name, timed["generate"], timed[name], [a - b for a, b in both], ways[name].stats.saved))
    title = f"Llama, {blocks} blocks, width {width}, bf16, batch 1, {new_tokens} tokens"
    return _finish(title, rows, "offramp bench wide", console)


def wide_model(width: int, blocks: int) -> Any:
    """Return a random bf16 Llama of this shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=round(2.75 * width),
        num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=512,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@dataclass(frozen=True)
class Evenly(ExitPolicy):
    """Row r of the batch leaves at exit r modulo the number of exits, whatever it holds: only for measuring."""

    exits: int = 4

    def start(self, batch: int, device: torch.device | str) -> State:
        """Number the rows."""
        return {"row": torch.arange(batch, device=device)}

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the rows whose turn it is."""
        return state["row"] % self.exits <= seen.index, state


def encoder(width: int, batch: int, length: int, repeats: int, console: Console) -> dict[str, Any]:
    """Measure a 12-block BERT classifier whose rows leave the batch evenly over 4 exits.

    ideal: for each block, its measured time at the full batch times the share of rows that had left before it.
    """
    model = encoder_model(width, length)
    ids = torch.arange(batch * length).view(batch, length) % 500 + 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with offramp.attach(model, ENCODER_AT) as exits, torch.no_grad():
        early = Early(model, Evenly(len(ENCODER_AT)))
        clock = Clocked(exits.backbone.blocks, lambda one: model(**one))  # type: ignore[attr-defined]
        ways: dict[str, Any] = {"full": lambda one: model(**one), "clocked": clock, "evenly": early}
        timed = interleaved(ways, [inputs] * repeats, warm=2)
    counts = [sum(r % len(ENCODER_AT) == i for r in range(batch)) for i in range(len(ENCODER_AT))]
    gone = [sum(n for n, d in zip(counts, ENCODER_AT, strict=True) if d <= b) / batch for b in range(12)]
    ideal = [sum(seconds * share for seconds, share in zip(one, gone, strict=True)) for one in clock.kept[-repeats:]]
    row = _row("4 exits", timed["full"], timed["evenly"], ideal, early.stats.saved)
    title = (
        f"BERT, 12 blocks, width {width}, float32, batch {batch}, {length} tokens, rows leave evenly at {ENCODER_AT}"
    )
    return _finish(title, [row], "offramp bench encoder", console)


def encoder_model(width: int, length: int) -> Any:
    """Return a random 12-block BERT classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=width,
        num_hidden_layers=12,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=max(64, length),
        num_labels=4,
    )
    return BertForSequenceClassification(config).eval()


Times = Sequence[Timed]


def _row(name: str, full: Times, early: Times, ideal: Sequence[float], saved: float) -> dict[str, Any]:
    """Return a row of medians; ratios are taken repeat by repeat, so that a slow moment of the machine cancels out."""
    middle = statistics.median
    gains = [a.seconds - b.seconds for a, b in zip(full, early, strict=True)]
    ratios = [gain / cost for gain, cost in zip(gains, ideal, strict=True)]
    return {
        "name": name,
        "seconds_full": middle(t.seconds for t in full),
        "seconds": middle(t.seconds for t in early),
        "speedup": middle(a.seconds / b.seconds for a, b in zip(full, early, strict=True)),
        "blocks_saved": saved,
        "saved_seconds": middle(gains),
        "ideal_seconds": middle(ideal),
        "realised": middle(ratios),
        "realised_quartiles": quartiles(ratios),
    }


def _finish(title: str, rows: list[dict[str, Any]], command: str, console: Console) -> dict[str, Any]:
    out = Table(title=title, title_justify="left", box=SIMPLE)
    for n, name in enumerate(("way", "full", "early", "speed", "saved", "ideal", "realised / ideal")):
        out.add_column(name, justify="right" if n else "left", no_wrap=True)
    for r in rows:
        seconds = [f"{1000 * r[k]:.0f} ms" for k in ("seconds_full", "seconds", "saved_seconds", "ideal_seconds")]
        out.add_row(r["name"], *seconds[:2], f"{r['speedup']:.2f}x", *seconds[2:], f"{r['realised']:.2f}")
    console.print(out)
    body = {"format": 1, "title": title, "shapes": rows, **origin(command)}
    console.print(f"{body['machine']}, {body['date']}", soft_wrap=True)
    return body
