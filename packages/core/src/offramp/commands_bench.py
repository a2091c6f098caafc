"""Commands that measure what needs no framework: `offramp bench kernels` and `offramp bench overhead`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from offramp.cli import Json, console, write_json
from offramp.errors import BadArgument

Results = Annotated[Path | None, typer.Option("--results", help="Folder that keeps raw numbers by machine and date.")]


def bench_kernels(
    op: Annotated[str | None, typer.Option(help="Only this op; default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of every way; the median counts.")] = 7,
    device: Annotated[str, typer.Option(help="Where they run: cpu, cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compiled", help="Measure torch.compile too (slow to start).")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes; the numbers mean little.")] = False,
    results: Results = None,
    out: Json = None,
) -> None:
    """Measure every kernel against the same thing written without it."""
    import torch

    from offramp.bench_kernels import measure

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        have = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise BadArgument(f"--device {device} is not on this machine; choose one of: {have}")

    def named(row: dict[str, Any]) -> str:
        return str(row["op"]) + str(row["way"]).removeprefix("kernel")

    def show(row: dict[str, Any]) -> None:
        ways = ", ".join(f"{name} {ms:.3g}" for name, ms in row["ms"].items())
        line = f"{named(row)} {row['shape']} {row['dtype']}: {row['speedup']:.2f} x {row['best_other']} (ms: {ways})"
        console().print(escape(line), soft_wrap=True)

    with torch.no_grad():
        body = measure(op, quick, repeats, device, compiled, show)
    table = Table("op", "shape", "type", "ms", "best other", "faster", "of copy bandwidth")
    for row in body["rows"]:
        other = f"{row['ms'][row['best_other']]:.3g} ({row['best_other']})"
        times = f"{row['ms'][row['way']]:.3g}", other, f"{row['speedup']:.2f} x"
        table.add_row(named(row), row["shape"], row["dtype"], *times, f"{row['of_copy_bandwidth']:.0%}")
    console().print(table, _where(body))
    _keep(body, "kernels", results, out)


def bench_overhead(
    executor: Annotated[str | None, typer.Option(help="Only this one, e.g. single_pass; default: all.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Measure compiled blocks too (slow to start).")] = False,
    depth: Annotated[int, typer.Option(min=4, help="Single pass: blocks; exits at 1/4, 1/2 and 3/4.")] = 12,
    width: Annotated[int, typer.Option(min=8, help="Single pass: width of the model.")] = 384,
    batch: Annotated[int, typer.Option(min=4, help="Single pass: rows of the batch.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Single pass: tokens of each row.")] = 16,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    results: Results = None,
    out: Json = None,
) -> None:
    """Measure what early exit saves over what the skipped blocks cost, and where the rest of the time goes."""
    from offramp.bench_overhead import measure

    body = measure(executor, repeats, compiled, depth=depth, width=width, batch=batch, tokens=tokens)
    names = sorted({name for row in body["rows"] for name in row["parts_ms"]})
    table = Table("executor", "rows leave", "full ms", "early ms", "blocks saved", "realised / ideal", "overhead",
                  "full model", *(f"{n} ms" for n in names))  # fmt: skip
    for row in body["rows"]:
        parts = [f"{row['parts_ms'].get(name, 0):.3g}" for name in names]
        realised = "-" if row["realised"] is None else f"{row['realised']:.2f}"
        times = f"{row['full_ms']:.3g}", f"{row['early_ms']:.3g}", f"{row['saved_blocks']:.0%}"
        shares = f"{row['overhead']:.1%}", f"{row['full_overhead']:.1%}"
        name = row["executor"] + ", compiled" * row["compiled"]
        table.add_row(name, escape(row["case"]), *times, realised, *shares, *parts)
    console().print(table, _where(body))
    _keep(body, "overhead", results, out)


def _where(body: dict[str, Any]) -> str:
    return f"{body['command']}: {body['machine']}, {body['date']}"


def _keep(body: dict[str, Any], what: str, results: Path | None, out: Path | None) -> None:
    """Write the JSON, and beside it, under the machine and the date, one file that holds every benchmark of that day.
    """
    import json

    write_json(out, body)
    if results is not None:
        kind = "-".join(body["kind"].lower().replace(",", "").split())
        file = results / f"{kind}-{body['date']}.json"
        results.mkdir(parents=True, exist_ok=True)
        before = json.loads(file.read_text()) if file.exists() else {}
        # one op or executor measured anew leaves the rows of the others
        new = {row.get("op", row.get("executor")) for row in body["rows"]}
        old = [row for row in before.get(what, {"rows": []})["rows"] if row.get("op", row.get("executor")) not in new]
        write_json(file, {**before, what: {**body, "rows": old + body["rows"]}})
