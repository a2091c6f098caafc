"""The page: sections in order, each from one part of the run's JSON; what a run does not hold is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from offramp.report import classify, images, speed, svg
from offramp.report.words import explain, percent, promise

#: tints of exits, shallow to deep; the full model is the last one and has no tint
TINTS, FULL = 5, 9
NAMES = {
    "text": "Generated text, coloured by depth",
    "exits": "Where {unit}s were decided",
    "images": "Images by the depth at which they left",
    "accuracy": "Accuracy against cost",
    "policies": "Policies",
    "calibrators": "Calibrators",
    "curves": "Quality against depth",
    "scores": "What each exit knows",
    "confusion": "How exits differ",
    "certificate": "Certificate",
    "speed": "Speed",
}


def html(run: Mapping[str, Any]) -> str:
    """Return the whole page."""
    title = str(run.get("title") or "offramp report")
    parts = list(sections(run))
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in parts)
    body = "".join(f'<section id="{n}"><h2>{escape(h)}</h2>{content}</section>' for n, h, content in parts)
    style = files("offramp.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1>{_lead(run)}</header><nav aria-label="Sections">{links}</nav>{body}'
        f"<footer>{_origin(run)}</footer></main></body></html>\n"
    )


def sections(run: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (id, heading, HTML) of every section that the run has something for, then those of the `runs` in it."""
    made = {
        "text": _text(run),
        "exits": _exits(run),
        "images": images.sheet(run),
        "accuracy": classify.accuracy(run),
        "policies": classify.policies(run),
        "calibrators": classify.calibrators(run),
        "curves": _curves(run),
        "scores": classify.scores(run),
        "confusion": classify.confusion(run),
        "certificate": _certificate(run) if "certificate" in run else "",
        "speed": speed.tables(run),
    }
    for name, content in made.items():
        if content:
            yield name, NAMES[name].format(unit=_unit(run)), content
    for one in run.get("runs") or []:
        for name, heading, content in sections(one):
            yield f"{one['name']}-{name}", f"{one['name']}: {heading[0].lower()}{heading[1:]}", content


def _unit(run: Mapping[str, Any]) -> str:
    """Return what is decided: a token, or a row of a classifier's batch."""
    return str(run.get("unit") or "token")


def level_of(depth: int, depths: Sequence[int]) -> int:
    """Return the tint of a depth: 0 for the shallowest exit, FULL for the full model."""
    if not depths or depth >= depths[-1]:
        return FULL
    exits = list(depths[:-1])
    place = min(range(len(exits)), key=lambda i: abs(exits[i] - depth))
    return round(place * (TINTS - 1) / max(1, len(exits) - 1))


def depths_of(run: Mapping[str, Any]) -> list[int]:
    """Return exits and full depth, from wherever the run says them."""
    found = {int(d) for d in (run.get("trace") or {}).get("depths", [])}
    found |= {int(d) for d in run.get("depths", [])}
    found |= {int(d) for counts in groups_of(run).values() for d in counts}
    found |= {int(t["depth"]) for one in run.get("text") or [] for t in one.get("tokens", [])}
    return sorted(found)


def groups_of(run: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return how many tokens were decided at each depth, by way; a run of one way need not name it."""
    found = run.get("exits") or {}
    if any(isinstance(counts, Mapping) for counts in found.values()):
        groups = dict(found)
    else:
        groups = {"": found} if found else {}
    return {name: {str(d): int(n) for d, n in counts.items()} for name, counts in groups.items()}


def _lead(run: Mapping[str, Any]) -> str:
    said = [f"<p>{escape(str(run['summary']))}</p>"] if run.get("summary") else []
    rows = {row["name"]: row for row in run.get("rows") or []}
    tiles = []
    if (row := rows.get("verified")) is not None:
        same = "identical text" if row.get("identical") else "text differs"
        tiles.append(("verified", f"{row['speedup']:.2f}×", f"speed of generate, {same}"))
    if (row := rows.get("calibrated")) is not None:
        certified = run.get("certificate") is not None
        tiles.append(
            (
                "calibrated",
                f"{row['speedup']:.2f}×",
                "speed of generate, " + ("certified" if certified else "uncertified"),
            )
        )
    if run.get("certificate"):
        c = run["certificate"]
        tiles.append(("promise", f"≤ {percent(c['alpha'])}", f"{c['risk']}, at {percent(1 - c['delta'])} confidence"))
    tiles += [(str(a), str(b), str(c)) for a, b, c in run.get("tiles") or []]
    cells = "".join(
        f"<li><span>{escape(a)}</span><strong>{_together(b)}</strong><small>{_together(c)}</small></li>"
        for a, b, c in tiles
    )
    return "".join([*said, f'<ul class="tiles">{cells}</ul>' if cells else ""])


def _origin(run: Mapping[str, Any]) -> str:
    parts = [
        ("Command", "command"),
        ("Model", "model"),
        ("Machine", "machine"),
        ("Date", "date"),
        ("offramp", "version"),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{escape(str(run[key]))}</dd>" for name, key in parts if run.get(key))
    return f"<dl>{rows}</dl>"


def _legend(depths: Sequence[int]) -> str:
    full = depths[-1] if depths else 0
    items = "".join(
        f'<li><span class="t d{level_of(d, depths)}">{"full model" if d == full else f"depth {d}"}</span></li>'
        for d in depths
    )
    return f'<ul class="legend" aria-label="Legend: depth at which a token was decided">{items}</ul>'


def _text(run: Mapping[str, Any]) -> str:
    samples = run.get("text") or []
    depths = depths_of(run)
    parts = [_legend(depths)] if samples else []
    for one in samples:
        tokens = one.get("tokens", [])
        early = sum(t["depth"] < depths[-1] for t in tokens)
        spans = "".join(_token(str(t["text"]), int(t["depth"]), depths) for t in tokens)
        prompt = f'<span class="prompt">{escape(str(one.get("prompt", "")))}</span>'
        parts.append(
            f"<figure><figcaption>{escape(str(one.get('name', 'generated')))}: {early} of {len(tokens)} tokens were "
            "decided before the last block. The prompt is grey.</figcaption>"
            f'<pre tabindex="0">{prompt}{spans}</pre></figure>'
        )
    return "".join(parts)


def _token(text: str, depth: int, depths: Sequence[int]) -> str:
    level = level_of(depth, depths)
    return f'<span class="t d{level}" title="{_told(depth, depths)}">{escape(text)}</span>'


def _told(depth: int, depths: Sequence[int]) -> str:
    return (
        f"decided by the full model ({depth} blocks)"
        if depth >= depths[-1]
        else f"decided at depth {depth} of {depths[-1]}"
    )


def _exits(run: Mapping[str, Any]) -> str:
    groups = groups_of(run)
    if not groups:
        return ""
    depths, parts = depths_of(run), []
    for name, counts in groups.items():
        total = sum(counts.values()) or 1
        items = []
        for d in depths:
            n = counts.get(str(d), 0)
            what = "full model" if d == depths[-1] else f"depth {d}"
            items.append((what, float(n), f"{n:,} ({n / total:.1%})", level_of(d, depths)))
        told = ", ".join(f"{what}: {text}" for what, _, text, _ in items)
        unit = _unit(run)
        title = f"{unit.capitalize()}s by the depth at which they were decided{f', {name}' if name else ''}. {told}"
        caption = f"<figcaption>{escape(name)}: {total:,} {unit}s</figcaption>" if name else ""
        parts.append(f"<figure>{caption}{svg.bars(items, title)}</figure>")
    return f'<div class="pair">{"".join(parts)}</div>'


def _curves(run: Mapping[str, Any]) -> str:
    trace = run.get("trace") or {}
    curves = {name: points for name, points in (trace.get("curves") or {}).items() if points}
    curves = {name: curves[name] for name in list(curves)[: len(svg.MARKS)]}  # more lines could not be told apart
    if not curves or trace.get("full_accuracy") is not None:  # with labels, accuracy against cost says more
        return ""
    series, lowest, chosen = [], 1.0, trace.get("chosen")
    for name, points in curves.items():
        told = [(p["depth_mean"], p["agreement"], _point(name, p)) for p in points]
        series.append(svg.Line(name, told))
        lowest = min([lowest, *(p["agreement"] for p in points)])
    certificate = run.get("certificate") or {}
    guides = []
    if certificate.get("risk") == "disagreement":
        guides.append((1 - certificate["alpha"], f"promised: {percent(1 - certificate['alpha'])}"))
    depths = trace["depths"]
    axes = svg.Axes(
        (depths[0], depths[-1]),
        (max(0.0, lowest - 0.03), 1.0),
        f"mean depth (blocks run per {_unit(run)})",
        "agreement",
        guides,
    )
    title = (
        "Agreement with the full model against mean depth, one line per policy; the same numbers are in the table below"
    )
    star = (chosen["depth_mean"], chosen["agreement"], _point("calibrated", chosen)) if chosen else None
    keys = "".join(f"<li>{svg.swatch(i)}{escape(line.name)}</li>" for i, line in enumerate(series))
    keys += '<li><span class="starkey" aria-hidden="true">★</span>calibrated</li>' if chosen else ""
    picture = f'<figure>{svg.lines(series, axes, title, star)}<ul class="legend">{keys}</ul></figure>'
    said = (
        f"<p>Simulated on the {trace['rows']:,} rows of the trace, without running the model. "
        "Higher and further left is better.</p>"
    )
    return said + picture + _curve_table(curves, trace)


def _point(name: str, p: Mapping[str, Any]) -> str:
    setting = p.get("setting") or {k: v for k, v in (p.get("policy") or {}).items() if k != "policy"}
    what = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in setting.items())
    return f"{name} ({what}): agreement {p['agreement']:.1%} at mean depth {p['depth_mean']:.2f}"


def _curve_table(curves: Mapping[str, Sequence[Mapping[str, Any]]], trace: Mapping[str, Any]) -> str:
    """Return the curves as numbers: the least mean depth at which each policy reaches an agreement."""
    goals = (0.99, 0.95, 0.9, 0.8)
    head = "".join(f'<th scope="col">{percent(g)}</th>' for g in goals)
    rows = []
    for name, points in curves.items():
        cells = []
        for goal in goals:
            best = min((p["depth_mean"] for p in points if p["agreement"] >= goal), default=None)
            cells.append(f"<td>{'none' if best is None else f'{best:.2f}'}</td>")
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    caption = f"Least mean depth (of {trace['depths'][-1]}) that keeps this agreement with the full model"
    return (
        f'<p class="caption">{_together(caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f'<thead><tr><th scope="col">policy</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _together(text: str) -> str:
    """Return escaped text whose percent signs stay with their numbers."""
    return escape(text).replace(" %", "&nbsp;%")


def _certificate(run: Mapping[str, Any]) -> str:
    certificate = run.get("certificate")
    said = f'<p class="promise">{_together(promise(certificate, str(run.get("note") or "")))}</p>'
    policy = run.get("policy") or {}
    what = ", ".join(f"{k} {v}" for k, v in policy.items() if k != "policy")
    chosen = (
        f"<p>Policy: <code>{escape(str(policy.get('policy')))}{f' ({escape(what)})' if what else ''}</code></p>"
        if policy
        else ""
    )
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code><span>{escape(meaning)}</span></dd>"
        for name, value, meaning in explain(certificate)
    )
    return said + chosen + (f'<dl class="fields">{rows}</dl>' if rows else "")
