"""The speed tables of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

MEANING = {
    "generate": "the framework's own generate, full depth",
    "never": "offramp enabled with the policy never: the overhead",
    "undrafted": "offramp's decoder without any exit: what it saves around the blocks",
    "verified": "drafts from exits, every token checked by the full model (lossless)",
    "calibrated": "tokens from exits at the certified risk (lossy)",
    "assistant_early_exit": "the framework's own early-exit drafting",
    "prompt_lookup": "the framework's own prompt lookup",
}


def tables(run: Mapping[str, Any]) -> str:
    """Return the table of the model and, when there is one, that of the plain model, with their note."""
    parts = []
    for key, name in (("rows", run.get("model") or "model"), ("plain_rows", run.get("plain_model") or "plain model")):
        if run.get(key):
            count = run[key][0].get("prompts") or run.get("prompts") or "some"
            parts.append(_table(run[key], f"{name}: {count} prompts, measured interleaved in one process"))
    if not parts:
        return ""
    names = dict.fromkeys(row["name"] for key in ("rows", "plain_rows") for row in run.get(key) or [])
    known = "".join(f"<dt>{escape(n)}</dt><dd>{escape(MEANING[n])}</dd>" for n in names if n in MEANING)
    note = (
        "<p>Speed is relative to generate: the ratio of tokens per second over all prompts, and in brackets the "
        "quartiles of the ratios prompt by prompt. Identical: all token ids of all prompts are equal to those of "
        "generate. Agreement: share of tokens that the full model would have chosen after the same text. Blocks: calls "
        "of a block, of those that the full model would make. Bound: full over "
        "run, the speed if nothing but calls of blocks took time.</p>"
    )
    return "".join(parts) + note + f'<dl class="fields">{known}</dl>'


def _table(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    columns = (
        "tokens / s",
        "speed",
        "identical",
        "agreement",
        "blocks saved",
        "accepted / drafted",
        "tokens / round",
        "bound",
        "blocks run / full",
    )
    head = "".join(f'<th scope="col">{c}</th>' for c in ("way", *columns))
    body = "".join(f'<tr><th scope="row">{_name(r)}{_layer(r)}</th>{_cells(r)}</tr>' for r in rows)
    label = escape(caption)
    return (
        f'<p class="caption">{label}</p><div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _name(row: Mapping[str, Any]) -> str:
    """Return the name with places to break the line at: on a phone it shares the width with numbers."""
    return escape(str(row["name"])).replace("_", "_<wbr>")


def _layer(row: Mapping[str, Any]) -> str:
    return f" <small>(layer {escape(str(row['layer']))})</small>" if row.get("layer") is not None else ""


def _cells(row: Mapping[str, Any]) -> str:
    spread = row.get("speedup_quartiles")
    identical = row.get("identical")
    drafted = row.get("drafted")
    cells = (
        _number(row.get("tokens_per_second"), ".1f"),
        f"<strong>{_number(row.get('speedup'), '.2f')}×</strong>"
        + (f" <small>({spread[0]:.2f} to {spread[-1]:.2f})</small>" if spread else ""),
        "–" if identical is None else ("✓ yes" if identical else "✗ no"),
        _number(row.get("agreement"), ".1%"),
        _number(row.get("saved"), ".1%"),
        f"{row.get('accepted', 0):,} / {drafted:,}" if drafted else "–",
        _number(row.get("tokens_per_round"), ".2f"),
        _number(row.get("bound"), ".2f", "×"),
        f"{row['blocks_run']:,} / {row['blocks_full']:,}" if row.get("blocks_full") else "–",
    )
    return "".join(f"<td>{c}</td>" for c in cells)


def _number(value: Any, style: str, unit: str = "") -> str:
    return "–" if not isinstance(value, (int, float)) else f"{value:{style}}{unit}"
