"""Commands that measure language models: `offramp bench lm|wide|encoder` and `offramp tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from offramp.cli import Json, console, write_json
from offramp.errors import BadArgument


def bench_lm(
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts (batches of them); default 50.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the fitted exits, shared with the demo.")] = Path(
        "demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Few steps and windows; the numbers mean little.")] = False,
    model: Annotated[Path | None, typer.Option(help="Model directory; default: both testbed models.")] = None,
    exits: Annotated[str | None, typer.Option(help="Fitted exits; default: fit them as the demo does.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text, or a .jsonl with a prompt per line.")] = None,
    assistant: Annotated[Path | None, typer.Option(help="Model directory for two-model assisted generation.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="An early_exit dict as JSON or a file of one; a row each.")
    ] = None,
    sample: Annotated[float | None, typer.Option(help="Sample at this temperature; default: greedy.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts generated from at once.")] = 1,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", min=2, help="Tokens per prompt.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure each way's peak memory too.")] = False,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")] = "cpu",
    synthetic: Annotated[
        str | None, typer.Option(help="An untrained shape instead: llama-7b-shape, llama-1b-shape, 24x1024, ...")
    ] = None,
    acceptance: Annotated[float, typer.Option(help="How often the oracle's drafts are right (--synthetic).")] = 0.8,
    exit_at: Annotated[int, typer.Option("--exit", min=1, help="Depth of the oracle's exit (--synthetic).")] = 4,
    draft: Annotated[int, typer.Option(min=1, help="Drafts per round (--synthetic).")] = 4,
    out: Json = None,
) -> None:
    """Measure every way of generating on a model, or on both testbed models."""
    from offramp_hf.bench import Ask, lm

    if sample is not None and sample <= 0:
        raise BadArgument(f"--sample {sample} is no temperature; write e.g. --sample 0.8, or leave it out for greedy")
    given: dict[str, Any] = {"model": model, "exits": exits, "text": text, "assistant": assistant}
    count = prompts or (50 if synthetic is None else 5)
    how: dict[str, Any] = {"sample": sample, "batch": batch, "new_tokens": new_tokens, "memory": memory}
    ask = Ask(count, quick, folder, **given, **how, settings=tuple(setting or ()), device=device)
    if synthetic is None:
        write_json(out, lm(ask, console()))
        return
    odd = [f"--{name}" for name, value in given.items() if value is not None]
    if odd:
        raise BadArgument(f"--synthetic {synthetic} builds its own model and exits; leave out {', '.join(odd)}")
    from offramp_hf.bench_synthetic import synthetic as measure_synthetic

    write_json(out, measure_synthetic(synthetic, exit_at, acceptance, draft, ask, console()))


def bench_wide(
    width: Annotated[int, typer.Option(help="Width of the model.")] = 1024,
    blocks: Annotated[int, typer.Option(help="Blocks; exits at 1/4, 1/2 and 3/4 of them.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2)] = 24,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    out: Json = None,
) -> None:
    """Measure realised / ideal of fixed exits on a wide model built from a config."""
    from offramp_hf.bench_shapes import wide

    write_json(out, wide(width, blocks, new_tokens, repeats, console()))


def bench_encoder(
    width: Annotated[int, typer.Option(help="Width of the encoder.")] = 256,
    batch: Annotated[int, typer.Option(min=4, help="Rows of the batch.")] = 64,
    length: Annotated[int, typer.Option(min=4, help="Tokens of each row.")] = 32,
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    out: Json = None,
) -> None:
    """Measure realised / ideal of rows that leave a 12-block encoder's batch evenly over 4 exits."""
    from offramp_hf.bench_shapes import encoder

    write_json(out, encoder(width, batch, length, repeats, console()))


def bench_gate(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the gates.")] = 300,
    rows: Annotated[int, typer.Option(min=1, help="Tokens per training step.")] = 256,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to measure on.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Depths of the offline schedule.")] = 4,
    out: Json = None,
) -> None:
    """Measure what speculative gates cost per token, and what they save."""
    from offramp_hf.bench_gate import gate

    write_json(out, gate(steps, rows, prompts, new_tokens, layers, console()))


def tune(
    model: Annotated[Path, typer.Option(help="Directory or hub id of a causal language model.")],
    exits: Annotated[str, typer.Option(help="Directory or hub id that exits.save() wrote.")],
    prompts: Annotated[Path, typer.Option(help="Text to take prompts from, or a .jsonl with a prompt per line.")],
    flag: Annotated[Path, typer.Option("--out", help="Where the early_exit dict is written.")] = Path(
        "early_exit.json"
    ),
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 40,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    lossless: Annotated[bool, typer.Option("--lossless/--any", help="Only verified settings, or any.")] = True,
    agreement: Annotated[float, typer.Option(help="Least agreement of what is written (--any).")] = 0.95,
    policy: Annotated[list[str] | None, typer.Option(help="Policies to choose from; repeat for several.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts per trial.")] = 8,
    length: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens per prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens generated per prompt.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    out: Json = None,
) -> None:
    """Search exits, rule and thresholds for one model and its prompts, and write the early_exit config."""
    from offramp_hf.tune import Search, search

    policies = tuple(policy or ())
    wanted = Search(trials, minutes, lossless, agreement, policies, count, length, new_tokens, seed)
    body = search(model, exits, prompts, flag, wanted, console())
    write_json(out, body)
    console().print(
        f"wrote {escape(str(flag))}; model.config.early_exit = json.load(open({str(flag)!r}))", soft_wrap=True
    )
