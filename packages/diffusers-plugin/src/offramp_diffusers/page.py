"""The page of a diffusion run: samples side by side, depth by noise level, errors by depth, and the table."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from offramp.policy import FULL
from offramp_diffusers.policies.time_schedule import blocks

#: of the picture of schedules and of errors
WIDTH, ROW, LEFT = 640, 26, 150
#: samples per row of a grid, and how many pixels one of its pixels becomes
ACROSS, ZOOM = 10, 4
#: pixels of black around each sample: digits fill their 8 x 8 pixels
GAP = 1


def html(body: Mapping[str, Any], grids: Mapping[str, Tensor]) -> str:
    """Return one self-contained page: no network, no script. grids: images [n, 1, h, w] from -1 to 1, by way."""
    style = files("offramp.report").joinpath("style.css").read_text(encoding="utf-8")
    grid = (
        ".grids{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1rem}"
        ".grids img{width:100%;max-width:26rem;image-rendering:pixelated}"
        ".scroll{overflow-x:auto}.chart text{fill:currentColor;font-size:12px}"
    )
    sections = (
        ("samples", "Samples", _samples(grids)),
        ("table", "Quality and time", _table(body)),
        ("schedule", "Depth by noise level", _schedules(body)),
        ("errors", "Errors by depth", _errors(body)),
    )
    parts = "".join(f'<section id="{n}"><h2>{escape(h)}</h2>{c}</section>' for n, h, c in sections)
    origin = " · ".join(
        f"{escape(name)}: {escape(str(body[key]))}"
        for name, key in (("Command", "command"), ("Model", "model"), ("Machine", "machine"), ("Date", "date"))
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(body["title"])}</title><style>{style}{grid}</style></head><body><main>'
        f"<header><h1>{escape(body['title'])}</h1><p>{escape(summary(body))}</p></header>{parts}"
        f"<footer><p>{origin}</p></footer></main></body></html>\n"
    )


def summary(body: Mapping[str, Any]) -> str:
    """Return what came out, in three sentences."""
    rows = {row["name"]: row for row in body["ways"]}
    early, gate = rows["early"], rows["uncertainty"]
    return (
        f"The fitted schedule runs {early['saved']:.1%} fewer blocks and is {early['speedup']:.2f}x as fast as the "
        f"full model; its Frechet distance is {early['frechet']:.3f} against {rows['full']['frechet']:.3f} "
        f"({early['against_full']:+.1%}), mean of {len(early['frechet_by_seed'])} solvers with a seed each. The gate "
        f"(uncertainty) saves {gate['saved']:.1%} at {gate['against_full']:+.1%}. The distance is taken in the "
        f"features of a small classifier trained here, and is no ImageNet FID; seeds alone move that of the full model "
        f"by {body['spread']['relative']:.1%} (standard deviation of {len(body['spread']['frechet'])})."
    )


def _samples(grids: Mapping[str, Tensor]) -> str:
    figures = "".join(
        f'<figure><img alt="Samples of {escape(name)}" src="data:image/png;base64,{_png(images)}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for name, images in grids.items()
    )
    return f'<p>The same noise, the classes 0 to 9 in turn; DDIM.</p><div class="grids">{figures}</div>'


def _png(images: Tensor) -> str:
    """Return a grid of images as base64 PNG."""
    from PIL import Image

    images, rows = pad(images, (GAP, GAP, GAP, GAP), value=-1.0), len(images) // ACROSS
    height, width = images.shape[-2:]
    grey = ((images[: rows * ACROSS, 0].clamp(-1, 1) + 1) * 127.5).byte()
    sheet = grey.reshape(rows, ACROSS, height, width).permute(0, 2, 1, 3).reshape(rows * height, ACROSS * width)
    size = ACROSS * width * ZOOM, rows * height * ZOOM
    picture = Image.fromarray(sheet.numpy()).resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _table(body: Mapping[str, Any]) -> str:
    head = ("way", "blocks saved", "seconds", "speed", "distance", "against full", "by solver, %", "accuracy")
    rows = "".join(
        f'<tr><th scope="row">{escape(r["name"])}</th><td>{r["saved"]:.1%}</td><td>{r["seconds"]:.2f}</td>'
        f"<td>{r['speedup']:.2f}x</td><td>{r['frechet']:.3f}</td><td>{r['against_full']:+.1%}</td>"
        f"<td>{' '.join(f'{100 * v:+.0f}' for v in r['against_full_by_seed'])}</td>"
        f"<td>{r['accuracy']:.1%}</td></tr>"
        for r in body["ways"]
    )
    titles = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    return (
        f"<p>Means over DDIM, DPM-Solver++ and UniPC of {body['solver_steps']} steps, {body['samples']} samples each. "
        f"The classifier that gives distance and accuracy is right on {body['judge_accuracy']:.1%} of held-out digits. "
        f"full was trained for {body['steps']['full']} steps. Every other model goes on from it, and learns its "
        f"answers (output distillation, in which full itself would stay as it is): early for {body['steps']['early']} "
        f"steps, those it is compared with for {body['steps']['others']}. "
        f"All ways of a solver start from the same noise. two_stage is the published table of DuoDiff; early, bolder "
        f"is fitted to run as few blocks as it does. A cache counts as saving the blocks that it did not run; its "
        f"setting ({_settings(body)}) is the boldest of those "
        f"tried that was within 3 % of the full model's distance on other noise. The gate's threshold is the one that "
        f'runs as many blocks as the schedule.</p><div class="scroll"><table><thead><tr>{titles}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _settings(body: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {'none' if v is None else v}" for name, v in body["settings"].items())


def _schedules(body: Mapping[str, Any]) -> str:
    depth, ran = body["stops"]["depths"][-1], dict(zip(*body["stops"].values(), strict=True))
    names = [n for n in body["schedules"] if n != "early, untuned" and "+" not in n]
    parts, top = [], 20
    for name in names:
        parts.append(f'<text x="0" y="{top + 42}">{escape(name)}</text>')
        cuts = [0.0, *body["cuts"][name], FULL]
        for low, high, given in zip(cuts[:-1], cuts[1:], body["schedules"][name], strict=True):
            count = ran[blocks(given, depth)]
            x, wide = LEFT + low / FULL * (WIDTH - LEFT), (high - low) / FULL * (WIDTH - LEFT)
            tall = 70 * count / depth
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{top + 70 - tall:.1f}" width="{wide - 2:.1f}" height="{tall:.1f}" '
                f'fill="#3b76c4"/><text x="{x + wide / 2:.1f}" y="{top + 84}" text-anchor="middle">{count}</text>'
            )
        top += 110
    parts.append(f'<text x="{LEFT}" y="{top}">clean (0)</text>')
    parts.append(f'<text x="{WIDTH}" y="{top}" text-anchor="end">noise ({FULL:g})</text>')
    chart = f'<svg class="chart" viewBox="0 0 {WIDTH} {top + 8}" role="img"><title>Blocks by noise level</title>'
    said = f"<p>Blocks that run, of {depth}, in each bin of noise levels.</p>"
    return f"{said}<figure>{chart}{''.join(parts)}</svg></figure>"


def _errors(body: Mapping[str, Any]) -> str:
    table: Sequence[Sequence[float]] = body["errors"]
    bins = len(table)
    titles = "".join(f'<th scope="col">{count}</th>' for count in body["stops"]["blocks"])
    rows = "".join(
        f'<tr><th scope="row">{FULL * b // bins:g} to {FULL * (b + 1) // bins:g}</th>'
        + "".join(f"<td>{e:.4f}</td>" for e in row)
        + "</tr>"
        for b, row in enumerate(table)
    )
    return (
        "<p>Mean squared error of the predicted noise after each number of blocks, of a model that was trained a "
        "little at every depth: what the schedule was solved from.</p>"
        f'<div class="scroll"><table><thead><tr><th scope="col">noise level</th>{titles}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )
