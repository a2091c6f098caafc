"""Commands for classifiers: `offramp demo classify` and `offramp bench classify`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from offramp.cli import Json, console, write_json

Folder = Annotated[Path, typer.Option("--out", help="Folder of the report and the fine-tuned classifier.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few rows and steps; the numbers mean little.")]
Sample = Annotated[
    bool, typer.Option("--sample", help="The 3,000 kept rows, also where the machine has a package index.")
]
Size = Annotated[int, typer.Option("--batch", min=1, help="Rows classified at once.")]


def demo_classify(
    folder: Folder = Path("demo"), quick: Quick = False, sample: Sample = False, size: Size = 64, out: Json = None
) -> None:
    """Fine-tune an encoder with exits on real text, certify a policy, measure it, and write a report."""
    from offramp_hf.bench_classify import Ask
    from offramp_hf.demo_classify import run

    started = time.perf_counter()
    write_json(out, run(Ask(folder, quick, sample, size), console()))
    seconds = time.perf_counter() - started
    console().print(f"wrote {escape(str(folder / 'report.html'))} and report.json in {seconds:.0f} s", soft_wrap=True)


def bench_classify(
    folder: Folder = Path("demo"),
    quick: Quick = False,
    sample: Sample = False,
    size: Size = 64,
    policy: Annotated[list[str] | None, typer.Option(help="A policy to measure; repeat for several.")] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="At most so many on the clock, evenly over all.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the table of the README.")] = None,
    out: Json = None,
) -> None:
    """Measure every policy of a classifier at its certified setting: simulated, and on the clock."""
    from offramp.checkpoint import write_text
    from offramp_hf import classify_tables
    from offramp_hf.bench_classify import Ask, classify

    body = classify(Ask(folder, quick, sample, size, tuple(policy or ()), batches), console())
    if markdown is not None:
        write_text(markdown, classify_tables.markdown(body))
    write_json(out, body)
