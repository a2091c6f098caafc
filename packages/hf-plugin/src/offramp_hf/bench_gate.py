"""`offramp bench gate`: what asking the gates of `speculative` heads costs per token, next to the blocks it saves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import offramp
from offramp.attach import Exits, find
from offramp.clock import BlockClock
from offramp.speculative import busiest
from offramp_hf.bench import origin
from offramp_hf.prepare import find_testbed, heldout, ids_of, load

MODELS = ("pycode-5m-layerskip", "pycode-5m")
#: tokens of a training window and of a prompt
WINDOW, PROMPT = 128, 32


class GateClock:
    """Seconds and calls of blocks, gates (subset logits, features, predictor) and whole heads, while it is on.

    Off, nothing is timed: `ready` puts a clock on each gate of the instance and takes it away again.
    """

    def __init__(self, exits: Exits) -> None:
        self.heads: list[Any] = [exits[d] for d in exits.at]
        self.blocks = BlockClock(exits.backbone.chain().blocks)
        self.whole = BlockClock(self.heads)
        self.seconds, self.asked, self.called = 0.0, 0, 0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Time everything in this context."""
        counts = [head.register_forward_hook(self._count) for head in self.heads]
        for head in self.heads:
            head.__dict__["gate"] = self._timed(head.gate)
        try:
            with self.blocks.ready(), self.whole.ready():
                yield
        finally:
            for head in self.heads:
                head.__dict__.pop("gate", None)
            for count in counts:
                count.remove()

    def _count(self, *args: Any) -> None:
        self.called += 1

    def _timed(self, gate: Any) -> Any:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            found = gate(*args)
            self.seconds += time.perf_counter() - start
            self.asked += 1
            return found

        return timed

    def read(self) -> dict[str, float]:
        """Return the totals so far."""
        blocks, heads = sum(self.blocks.seconds), sum(self.whole.seconds)
        out = {"block_seconds": blocks, "gate_seconds": self.seconds, "head_seconds": heads}
        return {**out, "asked": float(self.asked), "heads": float(self.called)}


def overhead(model: Any, prompts: Tensor, policy: Any, new_tokens: int = 64, **options: Any) -> dict[str, Any]:
    """Return what one step of greedy decoding costs with `policy`, batch 1, without the prefill.

    prompts: [n, tokens]; options: of `offramp.enable`. Per step: `block_seconds`, `gate_seconds`, `head_seconds`, gates
    `asked` and `heads` that ran whole (a draft or a confirmation; not the model's own readout); and `overhead` (gates
    and heads over blocks), `saved`, `early` tokens and `agreement`: the share of them that the full model chooses
    after the same text. Needs a device whose calls return when they are done (a CPU).
    """
    stats, total, same, early = offramp.Stats(), dict[str, float](), 0, 0
    with offramp.enable(model, policy, **options):
        _clocked(model, prompts[:1], 2)  # the first call probes how blocks can be run
    for prompt in prompts.split(1):
        with offramp.enable(model, policy, **options) as run:
            run.stats = stats
            one, out = _clocked(model, prompt, new_tokens)
        first, _ = _clocked(model, prompt, 1)
        total = {k: total.get(k, 0.0) + v - first[k] for k, v in one.items()}
        with torch.no_grad():
            best = model(out).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
        left = stats.last_depths < run.backbone.depth
        same += int((best == out[0, prompt.shape[1] :])[left].sum())
        early += int(left.sum())
    steps = len(prompts) * (new_tokens - 1)
    per_step = {k: v / steps for k, v in total.items()}
    extra = (per_step["gate_seconds"] + per_step["head_seconds"]) / per_step["block_seconds"]
    return {
        **per_step,
        "overhead": extra,
        "saved": stats.saved,
        "early": early,
        "agreement": same / early if early else None,
    }


def _clocked(model: Any, prompt: Tensor, new_tokens: int) -> tuple[dict[str, float], Tensor]:
    clock, mask = GateClock(find(model)), torch.ones_like(prompt)
    with clock.ready():
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        )
    return clock.read(), out


def gate(steps: int, rows: int, prompts: int, new_tokens: int, layers: int, console: Console) -> dict[str, Any]:
    """Train gates at every depth of a testbed model, then measure all gates, an offline schedule, and both levels."""
    source, other = (find_testbed(name) for name in MODELS)
    model, tokenizer = load(source)
    ids = ids_of(tokenizer, heldout(source, other))
    cut = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    half = len(cut) // 2
    with offramp.attach(model, range(2, model.config.num_hidden_layers), "speculative"):
        fitted = offramp.fit(model, cut[:half], loss="speculative_gate", steps=steps, rows=rows)
        policy = offramp.policy("speculative_gate")
        chosen = busiest(offramp.record(model, cut[:half][::8]), policy, layers)
        table: list[dict[str, Any]] = []
        both = {"layers": chosen, "online": True}
        ways: dict[str, dict[str, Any]] = {"all": {}, "offline": {"layers": chosen}, "offline + online": both}
        for name, options in ways.items():
            found = overhead(
                model, cut[half:][:prompts, :PROMPT], offramp.policy("speculative_gate", **options), new_tokens
            )
            table.append({"name": name, **options, **found})
    out = Table(title=f"{source.name}, batch 1, per token", title_justify="left", box=SIMPLE)
    for n, column in enumerate(("gates", "blocks", "gates", "heads", "asked", "overhead", "saved", "agreement")):
        out.add_column(column, justify="right" if n else "left", no_wrap=True)
    for r in table:
        times = [f"{1000 * r[k]:.2f} ms" for k in ("block_seconds", "gate_seconds", "head_seconds")]
        said = "" if r["agreement"] is None else f"{r['agreement']:.1%}"
        out.add_row(r["name"], *times, f"{r['asked']:.1f}", f"{r['overhead']:.1%}", f"{r['saved']:.1%}", said)
    console.print(out)
    body = {"format": 1, "gates": table, "loss": fitted.losses[-1], "seconds": fitted.seconds}
    body |= origin("offramp bench gate")
    console.print(f"{body['machine']}, {body['date']}", soft_wrap=True)
    return body
