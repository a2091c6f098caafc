"""Commands for image classifiers."""

from __future__ import annotations

from typing import Annotated

import typer

from offramp.cli import Json, console, group, write_json
from offramp_vision.commands_demo import bench_heads, demo_vision
from offramp_vision.commands_fit import fit_vision, record_vision


def add(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group(app, "demo").command("vision")(demo_vision)
    group(app, "fit").command("vision")(fit_vision)
    group(app, "record").command("vision")(record_vision)
    group(app, "bench").command("vision")(bench_vision)
    group(app, "bench").command("heads")(bench_heads)


def bench_vision(
    model: Annotated[list[str] | None, typer.Option(help="A model of timm, with random weights; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images per batch; repeat for several.")] = None,
    head: Annotated[str, typer.Option(help="Name of the exit head.")] = "pooled_linear",
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each; with --perceiver, seeds.")] = 3,
    perceiver: Annotated[bool, typer.Option("--perceiver", help="Train on digits, and compare latent exits.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training, with --perceiver.")] = 600,
    out: Json = None,
) -> None:
    """Measure how much of the skipped blocks' time leaving early really saves."""
    if perceiver:
        from offramp_vision import bench_perceiver

        write_json(out, bench_perceiver.bench(console(), repeats, steps))
        return
    from offramp_vision.bench import BATCHES, MODELS, Ask, bench

    write_json(out, bench(Ask(tuple(model or MODELS), tuple(batch or BATCHES), head, repeats), console()))
