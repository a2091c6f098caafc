"""`offramp demo lm`: the whole path on a real trained model, and a report of it."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import offramp
from offramp.cli import as_dict
from offramp.cli import step as step
from offramp.clock import one_thread, timed_with_bar
from offramp.report import FORMAT, save
from offramp.report.curves import summary
from offramp.report.words import promise
from offramp_hf import measure
from offramp_hf.measure import Generate
from offramp_hf.prepare import (
    Settings,
    Text,
    calibrated,
    find_testbed,
    fitted,
    heldout,
    ids_of,
    load,
    pieces,
    scaled,
)

#: exits of a model with 12 blocks; the head; the threshold of the verified row
DEPTHS, HEAD, HEAD_CONFIG, THRESHOLD = (3, 6, 8), "translator", (("rank", 256), ("act", "silu")), 0.4
#: sized so that both models together fit in under a minute each on 2 cores
OWN, OWN_TOKENS, STEPS, ROWS, LR = 256, 96, 350, 1024, 2e-3
#: calibration rows and their windows: what three quarters of a hundred thousand held-out tokens allow
WINDOWS, WINDOW = 1056, 48
#: prompts of the story, of the second model (all of them in `offramp bench lm`), of the layer sweep; texts shown
PROMPTS, PLAIN_PROMPTS, SWEEP, SAMPLES = 50, 10, 2, 2
#: layers tried for the framework's own early-exit drafting
ASSISTANT_LAYERS = (2, 3, 4, 6)

FULL = Settings(DEPTHS, HEAD, HEAD_CONFIG, THRESHOLD, OWN, OWN_TOKENS, STEPS, ROWS, LR, WINDOWS, WINDOW)
QUICK = dataclasses.replace(FULL, own=16, own_tokens=32, steps=20, rows=256, windows=256, new_tokens=24)


@dataclass
class Study:
    """Everything measured on one model; rows are plain JSON values."""

    rows: list[dict[str, Any]]
    trace: Any
    calibration: Any
    fit: dict[str, Any]
    ways: dict[str, Generate]
    timed: dict[str, list[measure.Timed]]
    prompts: list[Tensor]
    tokenizer: Any
    depth: int


@one_thread()
def run(
    folder: Path, model: Path | None, plain: Path | None, prompts: int | None, quick: bool, console: Console
) -> dict[str, Any]:
    """Study both models, write report.json and report.html into `folder`, and return what the JSON holds."""
    settings = QUICK if quick else FULL
    count = prompts or (3 if quick else PROMPTS)
    first, second = model or find_testbed("pycode-5m-layerskip"), plain or find_testbed("pycode-5m")
    story = study(first, second, settings, count, folder, console)
    other = study(second, first, settings, min(count, PLAIN_PROMPTS), folder, console)
    body = body_of(story, other, first.name, second.name, settings)
    save(body, folder)
    for name, one in ((first.name, story.rows), (second.name, other.rows)):
        console.print(table(name, one))
    console.print(escape(promise(body["certificate"], body["note"])), soft_wrap=True)
    return body


def study(
    source: Path, other: Path, settings: Settings, count: int, folder: Path, console: Console, extra: Sequence[str] = ()
) -> Study:
    """Load, attach, fit or reuse, record, calibrate and measure one model. extra: more rows, of `more_ways`."""
    name = source.name
    with step(console, f"{name}: load"):
        model, tokenizer = load(source)
        text = Text.split(ids_of(tokenizer, heldout(source, other)))
        prompts = text.prompts(count, settings.prompt_tokens)
    with step(console, f"{name}: attach heads and fit them on the model's own output"):
        exits, fit = fitted(model, source, text, settings, folder / f"exits-{name}")
    said = ", ".join(f"depth {d}: {a:.0%}" for d, a in fit["agreement"].items())
    console.print(f"  {'reused fitted exits' if fit['reused'] else 'fitted'}; agreement with the full model at {said}")
    with step(console, f"{name}: record a trace and calibrate"):
        trace, calibration = calibrated(model, text, settings)
    depth = exits.backbone.depth
    with step(console, f"{name}: find the best layer for assistant_early_exit"):
        layer = best_layer(model, prompts[:SWEEP], settings)
    ways = make_ways(model, settings, calibration, layer, extra)
    with step(console, f"{name}: generate {count} continuations in {len(ways)} ways"):
        timed = timed_with_bar(ways, prompts, console)
        rows = measure.rows(list(ways.values()), timed, prompts, depth)
        for row in rows:
            if row["name"] == "assistant_early_exit":
                row["layer"] = layer
            if row["blocks_run"] is None:
                row |= measure.count_blocks(ways[row["name"]], prompts[:SWEEP])
    return Study(rows, trace, calibration, fit, ways, timed, prompts, tokenizer, depth)


#: ways that only some measurements want
EXTRA = ("never", "hybrid", "prompt_lookup")


def make_ways(
    model: Any, settings: Settings, calibration: Any, layer: int, extra: Sequence[str]
) -> dict[str, Generate]:
    """Return the ways to generate, by name, plain generation first."""
    new, confident = settings.new_tokens, offramp.policy("confidence", threshold=settings.threshold)
    every = {
        "generate": Generate("generate", model, new),
        "never": Generate("never", model, new, "never"),
        "undrafted": Generate("undrafted", model, new, confident, {"verify": True, "draft": "none"}),
        "verified": Generate("verified", model, new, confident, {"verify": True}),
        "hybrid": Generate("hybrid", model, new, confident, {"verify": True, "draft": "hybrid"}),
        "calibrated": Generate("calibrated", model, new, calibration, {"kv": "catch_up"}),
        "assistant_early_exit": Generate("assistant_early_exit", model, new, arguments={"assistant_early_exit": layer}),
        "prompt_lookup": Generate("prompt_lookup", model, new, arguments={"prompt_lookup_num_tokens": 5}),
    }
    return {k: v for k, v in every.items() if k not in EXTRA or k in extra}


def best_layer(model: Any, prompts: Sequence[Tensor], settings: Settings) -> int:
    """Return the layer at which the framework's own early-exit drafting is fastest on these prompts."""
    depth = model.config.get_text_config().num_hidden_layers
    layers = scaled(ASSISTANT_LAYERS, depth)
    ways = {str(k): Generate(str(k), model, settings.new_tokens, arguments={"assistant_early_exit": k}) for k in layers}
    timed = measure.interleaved(ways, prompts, warm=0)
    return int(min(timed, key=lambda name: sum(t.seconds for t in timed[name])))


def body_of(story: Study, other: Study, name: str, plain: str, settings: Settings) -> dict[str, Any]:
    """Return the JSON of the report."""
    calibration = as_dict(story.calibration)
    return {
        "format": FORMAT,
        "title": f"Early exit on {name}",
        "summary": _summary(story, name, settings),
        "model": name,
        "plain_model": plain,
        "prompts": len(story.prompts),
        "rows": story.rows,
        "plain_rows": other.rows,
        **calibration,
        "plain_calibration": as_dict(other.calibration),
        "trace": summary(story.trace, story.calibration),
        "exits": {n: row["exits"] for n in ("verified", "calibrated") if (row := _row(story.rows, n)).get("exits")},
        "text": samples(story),
        "fit": story.fit,
        "settings": dataclasses.asdict(settings),
        "machine": measure.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["offramp", *sys.argv[1:]]) if Path(sys.argv[0]).name == "offramp" else "offramp demo lm",
        "version": offramp.__version__,
    }


def samples(story: Study) -> list[dict[str, Any]]:
    """Return the continuations that repeat themselves least, verified and calibrated, with the depth of every token."""

    def variety(i: int) -> int:
        made = story.timed["generate"][i].result[0, story.prompts[i].shape[1] :]
        return len(set(made.tolist()))

    out = []
    for i in sorted(range(len(story.prompts)), key=variety, reverse=True)[:SAMPLES]:
        ids = story.prompts[i]
        for name in ("verified", "calibrated"):
            way = story.ways[name]
            with way.ready():
                made = way(ids)[0, ids.shape[1] :].tolist()
            depths = way.stats.last_depths.tolist() or [story.depth] * len(made)
            tokens = [{"text": t, "depth": d} for t, d in zip(pieces(story.tokenizer, made), depths, strict=True)]
            out.append({"name": name, "prompt": story.tokenizer.decode(ids[0]), "tokens": tokens})
    return out


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Return the speed table for the terminal."""
    layers = [f"assistant_early_exit at its best layer, {row['layer']}" for row in rows if "layer" in row]
    out = Table(
        title=title, caption=", ".join(layers) or None, title_justify="left", caption_justify="left", box=SIMPLE
    )
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "way": lambda r: str(r["name"]),
        "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}",
        "speed": lambda r: f"{r['speedup']:.2f}x",
        "identical": lambda r: {None: "-", True: "yes", False: "no"}[r["identical"]],
        "saved": lambda r: "-" if r["saved"] is None else f"{r['saved']:.1%}",
        "accepted": lambda r: f"{r['accepted']}/{r['drafted']}" if r["drafted"] else "-",
    }
    for n, name in enumerate(columns):
        out.add_column(name, justify="right" if n else "left", no_wrap=n > 0)
    for row in rows:
        out.add_row(*(cell(row) for cell in columns.values()))
    return out


def _row(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def _summary(story: Study, name: str, settings: Settings) -> str:
    alone, verified, lossy = (_row(story.rows, name) for name in ("undrafted", "verified", "calibrated"))
    depths = ", ".join(map(str, story.trace.depths[:-1]))
    same = "token for token the same text" if verified["identical"] else "a text that differs"
    return (
        f"{name} ({story.depth} blocks) with {settings.head} heads at depths {depths}: "
        f"verified, it writes {same} as plain generate at {verified['speedup']:.2f} times the speed "
        f"({alone['speedup']:.2f} without drafts); calibrated, it "
        f"skips {lossy['saved']:.0%} of the block calls at {lossy['speedup']:.2f} times the speed."
    )
