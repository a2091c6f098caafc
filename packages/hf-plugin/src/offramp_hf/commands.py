"""Commands for language models: `offramp demo lm`, `fit lm`, `record lm`, `generate lm`, and those that measure."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from offramp.cli import Json, console, depths_of, group, options_from, told_fit, told_trace, write_json
from offramp_hf.commands_bench import bench_encoder, bench_gate, bench_lm, bench_wide, tune
from offramp_hf.commands_classify import bench_classify, demo_classify

Model = Annotated[str, typer.Argument(help="Directory or hub id of a causal language model.")]
Data = Annotated[list[Path], typer.Option("--data", help="Text files; repeat for several.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Option NAME=VALUE.")]
Exits = Annotated[str, typer.Option("--exits", help="Directory or hub id that exits.save() wrote.")]


def add(app: typer.Typer) -> None:
    """Add the commands to the application."""
    table: dict[tuple[str, str], Callable[..., None]] = {
        ("demo", "lm"): demo_lm,
        ("demo", "classify"): demo_classify,
        ("bench", "lm"): bench_lm,
        ("bench", "wide"): bench_wide,
        ("bench", "encoder"): bench_encoder,
        ("bench", "gate"): bench_gate,
        ("bench", "classify"): bench_classify,
        ("fit", "lm"): fit_lm,
        ("record", "lm"): record_lm,
        ("generate", "lm"): generate_lm,
    }
    for (verb, what), command in table.items():
        group(app, verb).command(what)(command)
    app.command("tune")(tune)


def demo_lm(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the report and the fitted exits.")] = Path("demo"),
    model: Annotated[Path | None, typer.Option(help="Model of the story; default: pycode-5m-layerskip.")] = None,
    plain: Annotated[Path | None, typer.Option(help="Second model of the table; default: pycode-5m.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Held-out prompts to measure on.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; the numbers mean little.")
    ] = False,
    out: Json = None,
) -> None:
    """Attach, fit, record, calibrate and measure on a real model, and write a report."""
    from offramp_hf.demo import run

    started = time.perf_counter()
    body = run(folder, model, plain, prompts, quick, console())
    write_json(out, body)
    console().print(
        f"wrote {escape(str(folder / 'report.html'))} and report.json in {time.perf_counter() - started:.0f} s"
    )


def fit_lm(
    model: Model,
    data: Data,
    folder: Annotated[Path, typer.Option("--out", help="Directory for the fitted exits.")],
    at: Annotated[str, typer.Option(help="Depths or fractions, e.g. 3,6,8 or 0.25,0.5.")] = "0.25,0.5,0.67",
    head: Annotated[str, typer.Option(help="Name of the head.")] = "translator",
    loss: Annotated[str, typer.Option(help="Name of the loss.")] = "distill",
    steps: Annotated[int, typer.Option(min=1)] = 300,
    window: Annotated[int, typer.Option(min=2, help="Tokens per training window.")] = 128,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Option NAME=VALUE of the head.")] = None,
    out: Json = None,
) -> None:
    """Attach heads to a language model, train them on text files, and save them."""
    import offramp
    from offramp_hf.prepare import load, windows

    lm, tokenizer = load(model)
    ids = windows(tokenizer, data, window)
    exits = offramp.attach(lm, depths_of(at), head, **options_from(set_ or []))
    report = offramp.fit(lm, ids, loss=loss, steps=steps)
    told_fit(exits, report, folder, "tokens", out)


def record_lm(
    model: Model,
    exits: Exits,
    data: Data,
    trace: Annotated[Path, typer.Option("--out", help="The trace, a safetensors file.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 64,
    per_row: Annotated[int, typer.Option(min=1, help="Tokens kept per window: 1 gives independent samples.")] = 1,
    out: Json = None,
) -> None:
    """Record what every exit says on text files."""
    import offramp
    from offramp_hf.prepare import load, windows

    lm, tokenizer = load(model)
    offramp.load(lm, exits)
    ids = windows(tokenizer, data, window)
    made = offramp.record(lm, {"input_ids": ids, "labels": ids}, per_row=per_row, progress=True)
    told_trace(made, trace, out)


def generate_lm(
    model: Model,
    exits: Exits,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    policy: Annotated[str, typer.Option(help="Name of the policy.")] = "confidence",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Option NAME=VALUE of the policy.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="A calibration instead of a policy.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Lossless: the full model checks every token.")] = False,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    out: Json = None,
) -> None:
    """Continue a text and show at which depth each token was decided."""
    import offramp
    from offramp_hf.prepare import load, pieces

    lm, tokenizer = load(model)
    found = offramp.load(lm, exits)
    chosen: Any = policy if calibration is None else offramp.Calibration.load(calibration)
    options = options_from(set_ or [])
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with offramp.enable(lm, chosen, verify=verify, **options) as run:
        made = lm.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=new_tokens, do_sample=False)
    tokens = pieces(tokenizer, made[0, ids.shape[1] :].tolist())
    depths = run.stats.last_depths.tolist() or [run.backbone.depth] * len(tokens)
    styles = ("bold green", "green", "cyan", "blue")
    style = {d: styles[min(i, len(styles) - 1)] for i, d in enumerate(found.at)}
    text = Text(prompt, style="dim")
    for token, depth in zip(tokens, depths, strict=True):
        text.append(token, style=style.get(depth, ""))
    legend = Text.assemble(*[(f"depth {d}  ", style[d]) for d in found.at], f"full model {run.backbone.depth}")
    console().print(text, legend, sep="\n\n")
    console().print(f"blocks saved: {run.stats.saved:.1%}, mean depth {run.stats.depth_mean:.2f}")
    sample = {
        "name": "generated",
        "prompt": prompt,
        "tokens": [{"text": t, "depth": d} for t, d in zip(tokens, depths, strict=True)],
    }
    write_json(
        out, {"format": 1, "text": [sample], "depths": [*found.at, run.backbone.depth], "stats": run.stats.to_dict()}
    )
