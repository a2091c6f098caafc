"""The benchmark's second table: how the time was spent, beside how fast it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table


def details(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Return quartiles of the speed, agreement, tokens per round, bound and efficiency of rows of `measure.rows`."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "way": lambda r: str(r["name"]),
        "quartiles": lambda r: "{0:.2f}-{2:.2f}".format(*r["speedup_quartiles"]),
        "agree": lambda r: _or_dash(r["agreement"], ".1%"),
        "/round": lambda r: _or_dash(r["tokens_per_round"], ".2f"),
        "bound": lambda r: _or_dash(r["bound"], ".2f", "x"),
        "of bound": lambda r: _or_dash(r.get("of_bound"), ".0%"),
        "busy": lambda r: _or_dash(r.get("busy"), ".0%"),
        "realised": lambda r: _or_dash(r["realised"], ".2f"),
    }
    if any("peak_memory" in row for row in rows):
        columns["memory"] = lambda r: f"{r['peak_memory'] / 2**20:.0f} MiB" if r.get("peak_memory") else "-"
    out = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for n, name in enumerate(columns):
        out.add_column(name, justify="right" if n else "left", no_wrap=n > 0)
    for row in rows:
        out.add_row(*(cell(row) for cell in columns.values()))
    return out


def _or_dash(value: float | None, form: str, after: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{after}"
