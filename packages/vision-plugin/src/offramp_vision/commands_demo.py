"""Commands that train small classifiers on digits: `offramp demo vision` and `offramp bench heads`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from offramp.cli import Json, console, write_json

Folder = Annotated[Path, typer.Option("--out", help="Folder of the report.")]
Quick = Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes; the numbers mean nothing.")]


def demo_vision(folder: Folder = Path("demo"), quick: Quick = False, out: Json = None) -> None:
    """Train a small ViT and CNN with exits on digits, certify a policy, measure it, and write a report."""
    from offramp_vision.demo import run

    body = run(folder, quick, console())
    write_json(out, body)
    console().print(*(table(one) for one in body["runs"]))
    console().print(escape(body["summary"]), soft_wrap=True)
    console().print(f"wrote {escape(str(folder / 'report.html'))} in {body['seconds']:.0f} s", soft_wrap=True)


def bench_heads(
    seeds: Annotated[int, typer.Option(min=1, help="Splits and weights to take the mean over.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the heads.")] = 100,
    share: Annotated[float, typer.Option(min=0.0, help="Share of the classifiers' own training steps.")] = 0.75,
    out: Json = None,
) -> None:
    """Measure how right LGViT's heads are against linear ones, at every exit of frozen classifiers."""
    from offramp_vision.bench_heads import Ask, bench

    write_json(out, bench(Ask(seeds, steps, share), console()))


def table(body: dict[str, Any]) -> Table:
    """Return the policies of one classifier as a table for the terminal."""
    title = f"{body['name']}: full model right on {body['trace']['full_accuracy']:.1%}, batch {body['clock']['batch']}"
    out = Table(title=title, title_justify="left", box=SIMPLE)
    for n, name in enumerate(("policy", "accuracy", "risk", "saved", "measured", "realised")):
        out.add_column(name, justify="right" if n else "left")
    for row in body["policies"]:
        if "speedup" not in row:
            out.add_row(row["name"], "not certified", "", "", "", "")
            continue
        realised = "-" if row["realised"] is None else f"{row['realised']:.2f}"
        shares = f"{row['accuracy']:.1%}", f"{row['risk']:.2%}", f"{row['saved']:.1%}"
        out.add_row(row["name"], *shares, f"{row['speedup']:.2f}x", realised)
    return out
