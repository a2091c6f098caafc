"""The sections of a classifier's page: accuracy against cost, policies on the clock, exits, and how exits differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from offramp.report import svg
from offramp.report.curves import at_cost

#: lines in one picture: more could not be told apart; the table has them all
LINES = 6
#: costs of the table, as shares of the full model's
SHARES = (1 / 3, 1 / 2, 2 / 3, 5 / 6)


def accuracy(run: Mapping[str, Any]) -> str:
    """Return the picture and the table of accuracy against cost; nothing where the trace had no labels."""
    trace = run.get("trace") or {}
    labelled = {n: [p for p in points if "accuracy" in p] for n, points in (trace.get("curves") or {}).items()}
    curves = {name: sorted(points, key=lambda p: p["cost_mean"]) for name, points in labelled.items() if points}
    if not curves or trace.get("full_accuracy") is None:
        return ""
    full, cost, unit = trace["full_accuracy"], trace["full_cost"], trace.get("unit", "blocks")
    ranked = sorted(curves, key=lambda name: -(at_cost(curves[name], cost / 2) or 0.0))
    series = [svg.Line(n, [(p["cost_mean"], p["accuracy"], _told(n, p, unit)) for p in curves[n]]) for n in ranked]
    series = series[:LINES]
    values = [y for line in series for _, y, _ in line.points] + [full]
    low, high = max(0.0, min(values) - 0.01), min(1.0, max(values) + 0.01)
    guides = [(full, "")]  # named in the legend: where the lines meet it, there is no room for words
    least = min(p["cost_mean"] for points in curves.values() for p in points)
    axes = svg.Axes((least, cost), (low, high), f"mean cost per row ({unit})", "accuracy", guides)
    chosen = trace.get("chosen")
    star = None
    if chosen and "accuracy" in chosen:
        star = (chosen["cost_mean"], chosen["accuracy"], _told("calibrated", chosen, unit))
    title = "Accuracy against mean cost, one line per policy; the same numbers are in the table below"
    keys = "".join(f"<li>{svg.swatch(i)}{escape(line.name)}</li>" for i, line in enumerate(series))
    keys += '<li><span class="starkey" aria-hidden="true">★</span>calibrated</li>' if star else ""
    keys += f'<li><span class="guidekey" aria-hidden="true"></span>full model: {full:.1%}</li>'
    picture = f'<figure>{svg.lines(series, axes, title, star)}<ul class="legend">{keys}</ul></figure>'
    said = (
        f"<p>Every setting of every policy, replayed on the {trace['rows']:,} rows of one trace. Drawn are the "
        f"{len(series)} policies that are best at half the cost. Higher and further left is better.</p>"
    )
    return said + picture + _cost_table([(n, curves[n]) for n in ranked], cost, unit)


def _told(name: str, p: Mapping[str, Any], unit: str) -> str:
    return f"{name}: accuracy {p['accuracy']:.1%} at {p['cost_mean']:.2f} {unit} per row"


def _cost_table(curves: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], full: float, unit: str) -> str:
    head = [f"{full * share:.3g}" for share in SHARES]
    rows = []
    for name, points in curves:
        found = [at_cost(points, full * share) for share in SHARES]
        rows.append((name, ["none" if value is None else f"{value:.1%}" for value in found]))
    caption = f"Accuracy at equal mean cost ({unit} per row, of {full:g}; between two settings a coin is thrown)"
    return table(caption, ("policy", *head), rows)


def policies(run: Mapping[str, Any]) -> str:
    """Return the table of policies: promised, simulated, and measured on the clock."""
    found = sorted(run.get("policies") or [], key=lambda one: -(one.get("speedup") or 0.0))
    if not found:
        return ""
    rows = []
    for one in [row for row in found if not row.get("note")]:
        spread = one.get("speedup_quartiles")
        measured = number(one.get("speedup"), ".2f", "×")
        measured += f" <small>({spread[0]:.2f} to {spread[-1]:.2f})</small>" if spread else ""
        rows.append(
            (
                one["name"],
                [
                    measured,
                    number(one.get("accuracy"), ".1%"),
                    number(one.get("risk"), ".2%"),
                    number(one.get("saved"), ".1%"),
                    number(one.get("bound"), ".2f", "×"),
                    number(one.get("realised"), ".2f"),
                    number(one.get("agreement"), ".1%"),
                    number(one.get("rows_per_second"), ".0f"),
                    escape(setting(one.get("policy") or {})),
                ],
            )
        )
    head = ("policy", "measured", "accuracy", "risk", "saved", "bound", "realised", "agreement", "rows / s", "setting")
    clock = run.get("clock") or {}
    how = f"batch {clock['batch']}, {clock['calls']} batches, interleaved in one process" if clock else "held-out rows"
    note = (
        "<p>Each policy at its boldest certified setting, each promise by itself. Risk: what was promised to be small, "
        "on these rows. Saved: blocks that did not run. Bound: the speed if nothing but blocks took time. Measured: "
        "full model's time over this one's, all batches together, and in brackets the quartiles of the ratios batch by "
        "batch. Realised: time saved over what the skipped blocks would have cost."
        "</p>"
    )
    if live := [one for one in found if "moved" in one]:
        moved, total = sum(one["moved"] for one in live), sum(sum(one["exits"].values()) for one in live)
        note += f"<p>Of {total:,} answers, {moved:,} came from another exit live than in the replay of the trace.</p>"
    bad = [one for one in found if one.get("note")]
    why = "".join(f"<dt>{escape(one['name'])}</dt><dd>{escape(one['note'])}</dd>" for one in bad)
    why = f'<p>Without a certified setting, and why:</p><dl class="fields">{why}</dl>' if why else ""
    return table(f"Policies: {how}", head, rows) + note + why


def calibrators(run: Mapping[str, Any]) -> str:
    """Return the table of calibrators: what each makes of one policy on the same rows."""
    rows, keys = [], ("accuracy", "agreement", "saved")
    for one in [row for row in run.get("calibrators") or [] if row.get("policy")]:
        c = one.get("certificate")
        said = f"{c['risk']} ≤ {c['alpha']:g}" if c else "none"
        cells = [number(one.get(key), ".1%") for key in keys]
        rows.append((one["name"], [*cells, escape(said), escape(setting(one["policy"]))]))
    if not rows:
        return ""
    return table("What each makes of one policy", ("calibrator", *keys, "promise", "setting"), rows)


def scores(run: Mapping[str, Any]) -> str:
    """Return the table of exits: how right each is, and how well its scores know when."""
    found = run.get("exit_scores") or []
    if not found:
        return ""
    # heads that read whole states have no cosine of neighbours: such a column would be empty
    names = list(dict.fromkeys(n for one in found for n, value in one["auroc"].items() if value is not None))
    rows = []
    for one in found:
        what = "full model" if one is found[-1] else f"depth {one['depth']}"
        cells = [number(one[key], ".1%") for key in ("accuracy", "agreement")] + [number(one["ece"], ".3f")]
        rows.append((what, cells + [number(one["auroc"].get(name), ".3f") for name in names]))
    head = ("exit", "accuracy", "agreement", "ECE", *(f"AUROC {name}" for name in names))
    note = (
        "<p>ECE: how far top-1 probability is from the share that is right. AUROC: how well a statistic tells the rows "
        "on which the exit will agree with the full model; 0.5 says nothing, 1 says all. The second matters more for "
        "exiting early.</p>"
    )
    return table("Each exit on its own, had all rows left there", head, rows) + note


def confusion(run: Mapping[str, Any]) -> str:
    """Return how exits differ from each other, and what the full model gains and loses against each."""
    found = run.get("confusion") or {}
    if not found:
        return ""
    names = [f"depth {d}" for d in found["depths"][:-1]] + ["full model"]
    head = ("exit", *names)
    rows = [(name, [tint(value) for value in line]) for name, line in zip(names, found["same"], strict=True)]
    parts = [table("Share of rows on which two exits give the same answer", head, rows)]
    if found.get("outcomes"):
        head = ("exit", "both right", "only the exit", "only the full model", "neither")
        keys = ("both", "only_exit", "only_full", "neither")
        lines = [(f"depth {one['depth']}", [f"{one[key]:.1%}" for key in keys]) for one in found["outcomes"]]
        parts.append(table("Who is right: an exit against the full model", head, lines))
        parts.append("<p>Only the exit: the full model thought on and went wrong, which an early exit avoids.</p>")
    return "".join(parts)


def setting(policy: Mapping[str, Any]) -> str:
    """Return the options of a policy's config in words."""

    def short(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(short(v) for v in value) + "]"
        if isinstance(value, Mapping):
            return f"{value.get('policy', '')}({setting(value)})"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{key} {short(value)}" for key, value in policy.items() if key != "policy")


def table(caption: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table that scrolls sideways in its own box. rows: (name, cells as HTML)."""
    label = escape(caption)
    cells = "".join(f'<th scope="col">{escape(c)}</th>' for c in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name).replace("_", "_<wbr>")}</th>{"".join(_cell(c) for c in line)}</tr>'
        for name, line in rows
    )
    return (
        f'<p class="caption">{label}</p><div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def tint(share: float) -> str:
    """Return a table cell that is the darker the larger the share; below one half it has no tint."""
    strength = round(55 * max(0.0, 2 * share - 1))
    return f'<td style="background: rgb(var(--tint) / {strength}%)">{share:.1%}</td>'


def number(value: Any, style: str, unit: str = "") -> str:
    """Return a number in words, a dash for none."""
    return "–" if not isinstance(value, (int, float)) else f"{value:{style}}{unit}"
