"""The tables of `offramp bench classify`, for the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from offramp.report.classify import SHARES, setting
from offramp.report.curves import at_cost

Columns = Mapping[str, Callable[[dict[str, Any]], str]]


def tables(body: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a run: policies, accuracy at equal cost, exits, calibrators."""
    clock, trace = body["clock"], body["trace"]
    title = f"Policies at their certified setting; full model: {trace['full_accuracy']:.1%}, batch {clock['batch']}"
    columns = {k: v for k, v in POLICIES.items() if k != "quartiles"}  # what a terminal of 80 characters has room for
    found = [_table(title, columns, [row for row in body["policies"] if "saved" in row])]
    costs = [trace["full_cost"] * share for share in SHARES]
    equal = [
        {"name": name, **{f"{c:.3g}": at_cost(points, c) for c in costs}} for name, points in trace["curves"].items()
    ]
    columns = {"policy": lambda r: str(r["name"])}
    columns |= {f"{c:.3g}": lambda r, key=f"{c:.3g}": share(r[key]) for c in costs}  # type: ignore[misc]
    found.append(_table(f"Accuracy at equal mean cost ({trace['unit']} of {trace['full_cost']:g})", columns, equal))
    found.append(_table("Each exit, had all rows left there", _exit_columns(body), body["exit_scores"]))
    found.append(_table("Calibrators, on one policy", CALIBRATORS, [r for r in body["calibrators"] if r["policy"]]))
    return found


def share(value: float | None, form: str = ".1%") -> str:
    """Return a share in words, a dash for none."""
    return "-" if value is None else f"{value:{form}}"


def times(row: Mapping[str, Any], key: str = "speedup") -> str:
    """Return a factor in words."""
    return "-" if row.get(key) is None else f"{row[key]:.2f}x"


POLICIES: Columns = {
    "policy": lambda r: str(r["name"]),
    "setting": lambda r: setting(r["policy"]).removeprefix("threshold "),
    "accuracy": lambda r: share(r["accuracy"]),
    "agree": lambda r: share(r["agreement"]),
    "risk": lambda r: share(r.get("risk"), ".2%"),
    "saved": lambda r: share(r["saved"]),
    "bound": lambda r: times(r, "bound"),
    "measured": times,
    "quartiles": lambda r: "{0:.2f}-{2:.2f}".format(*r["speedup_quartiles"]) if "speedup_quartiles" in r else "-",
    "rows/s": lambda r: share(r.get("rows_per_second"), ".0f"),
    "realised": lambda r: share(r.get("realised"), ".2f"),
}
CALIBRATORS: Columns = {
    "calibrator": lambda r: str(r["name"]),
    "setting": lambda r: setting(r["policy"]).removeprefix("threshold "),
    "certified": lambda r: "{risk} <= {alpha:g}".format(**r["certificate"]) if r["certificate"] else "no",
    "accuracy": lambda r: share(r["accuracy"]),
    "agree": lambda r: share(r["agreement"]),
    "saved": lambda r: share(r["saved"]),
}


def _exit_columns(body: Mapping[str, Any]) -> Columns:
    names = list(dict.fromkeys(name for one in body["exit_scores"] for name in one["auroc"]))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "depth": lambda r: str(r["depth"]),
        "accuracy": lambda r: share(r["accuracy"]),
        "agree": lambda r: share(r["agreement"]),
        "ECE": lambda r: share(r["ece"], ".3f"),
    }
    columns |= {f"AUROC {n}": lambda r, key=n: share(r["auroc"].get(key), ".3f") for n in names}  # type: ignore[misc]
    return columns


def _table(title: str, columns: Columns, rows: Sequence[dict[str, Any]]) -> Table:
    out = Table(title=escape(title), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for n, name in enumerate(columns):
        out.add_column(name, justify="right" if n else "left")
    for row in rows:
        out.add_row(*(escape(cell(row)) for cell in columns.values()))
    return out


def markdown(body: Mapping[str, Any]) -> str:
    """Return what the README has: the certified policies, the fastest first, those without a certificate in words, and
    all policies at equal cost.
    """
    rows = sorted((r for r in body["policies"] if "saved" in r), key=lambda r: -r.get("speedup", 0.0))
    names = ("policy", "setting", "accuracy", "risk", "saved", "bound", "measured", "quartiles", "realised")
    lines = ["| " + " | ".join(names) + " |", "|---|---|" + "---:|" * (len(names) - 2)]
    for row in rows:
        cells = [f"`{row['name']}`", *(POLICIES[name](row) for name in names[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    none = [f"`{row['name']}`" for row in body["policies"] if "saved" not in row]
    said = f"\n\nWithout a certified setting: {', '.join(none)}." if none else ""
    return "\n".join(lines) + said + "\n\n" + _equal_cost(body["trace"]) + "\n"


def _equal_cost(trace: Mapping[str, Any]) -> str:
    """Return accuracy at equal mean cost as markdown, the best at half the cost first."""
    full, unit = trace["full_cost"], trace["unit"]
    costs = [full * s for s in SHARES]
    rows = [(name, [at_cost(points, c) for c in costs]) for name, points in trace["curves"].items()]
    said = f"Accuracy at equal mean cost, of {full:g} {unit} (the full model: {trace['full_accuracy']:.1%}):"
    lines = [said, "", f"| policy | {' | '.join(f'{c:.3g} {unit}' for c in costs)} |", "|---|" + "---:|" * len(costs)]
    for name, found in sorted(rows, key=lambda row: -(row[1][1] or 0.0)):
        lines.append(f"| `{name}` | " + " | ".join(share(value) for value in found) + " |")
    return "\n".join(lines)
