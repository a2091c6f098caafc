"""Commands for denoisers: `offramp demo diffusion` and `offramp bench diffusion`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from offramp.cli import Json, console, group, write_json

Folder = Annotated[Path, typer.Option("--out", help="Folder of the report.")]
Quick = Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes; the numbers mean nothing.")]


def add(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group(app, "demo").command("diffusion")(demo_diffusion)
    group(app, "bench").command("diffusion")(bench_diffusion)


def demo_diffusion(
    folder: Folder = Path("demo"),
    quick: Quick = False,
    model: Annotated[str, typer.Option(help="dit, or uvit: deep blocks also read shallow states; 7-20 min.")] = "dit",
    seed: Annotated[int, typer.Option(min=0, help="Of the trainings.")] = 0,
    out: Json = None,
) -> None:
    """Train a small denoiser on digits, fit a schedule of depths, and sample with fewer blocks."""
    from offramp_diffusers.demo import run
    from offramp_diffusers.page import summary

    body = run(folder, quick, console(), model, seed)
    write_json(out, body)
    console().print(table(body))
    console().print(escape(summary(body)), soft_wrap=True)
    console().print(f"wrote {escape(str(folder / 'report.html'))} in {body['seconds']:.0f} s", soft_wrap=True)


def table(body: dict[str, Any]) -> Table:
    """Return the ways as a table for the terminal."""
    out = Table("way", "blocks saved", "seconds", "speed", "Frechet", "against full", "class accuracy")
    for r in body["ways"]:
        numbers = f"{r['saved']:.1%}", f"{r['seconds']:.2f}", f"{r['speedup']:.2f}x", f"{r['frechet']:.3f}"
        out.add_row(escape(r["name"]), *numbers, f"{r['against_full']:+.1%}", f"{r['accuracy']:.1%}")
    return out


def bench_diffusion(
    shape: Annotated[list[str] | None, typer.Option(help="dit, pixart, sd3 or flux; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each way.")] = 25,
    caches: Annotated[bool, typer.Option(help="Train on digits, and compare with caches; minutes.")] = True,
    out: Json = None,
) -> None:
    """Measure what a skipped block costs, how much of the ideal saving is realised, and exits and caches at equal
    quality."""
    from offramp_diffusers import bench, bench_caches

    show = console()
    body = bench.run(tuple(shape or ()), rounds)
    if caches:
        body["caches"] = bench_caches.run(show)
    else:
        body["command"] += " --no-caches"
    write_json(out, body)
    show.print(shapes_table(body))
    show.print(
        f"a skipped block costs {body['overhead_us']:.1f} microseconds, a schedule that skips nothing "
        f"{body['idle_us']:.0f} a call"
    )
    if caches:
        show.print(caches_table(body["caches"]))
        for line in bench_caches.together(body["caches"]["rows"]):
            show.print(escape(line), soft_wrap=True)


def shapes_table(body: dict[str, Any]) -> Table:
    """Return the shapes as a table for the terminal."""
    out = Table("shape", "block (ms)", "full (ms)", "early (ms)", "cut (ms)", "realised / ideal", "never / full")
    for r in body["rows"]:
        times = (f"{r[k]:.1f}" for k in ("block_ms", "full_ms", "early_ms", "short_ms"))
        out.add_row(r["name"], *times, f"{r['realised']:.3f}", f"{r['never']:.3f}")
    return out


def caches_table(body: dict[str, Any]) -> Table:
    """Return exits and caches as a table for the terminal."""
    out = Table("way", "setting", "blocks saved", "seconds", "speed", "Frechet", "against full", "class accuracy")
    for r in body["rows"]:
        numbers = f"{r['saved']:.1%}", f"{r['seconds']:.2f}", f"{r['speedup']:.2f}x", f"{r['frechet']:.3f}"
        setting = "" if r["setting"] is None else str(r["setting"])
        out.add_row(escape(r["name"]), setting, *numbers, f"{r['against_full']:+.1%}", f"{r['accuracy']:.1%}")
    return out
