"""Commands for denoisers: `offramp demo diffusion`."""

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


def demo_diffusion(folder: Folder = Path("demo"), quick: Quick = False, out: Json = None) -> None:
    """Train a small DiT on digits, fit a schedule of depths, and sample with fewer blocks."""
    from offramp_diffusers.demo import run
    from offramp_diffusers.page import summary

    body = run(folder, quick, console())
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
