"""`offramp demo vision`: train small classifiers with exits on real images, certify a policy, measure, and report."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import offramp
from offramp.attach import find
from offramp.bench_policies import calibrations, on_the_clock, policy_row
from offramp.cli import as_dict, step
from offramp.clock import one_thread, origin
from offramp.report import FORMAT, save
from offramp.report.curves import summary
from offramp.report.scores import exit_scores
from offramp.report.words import promise
from offramp_vision import digits
from offramp_vision.study import QUICK, SHAPES, Part, Plan, Shape, batches, parts
from offramp_vision.training import fitted

#: folder of the fitted classifiers, in that of the report
FITTED = "vision"
#: policies on the clock; the first is the one that is shown, and of which the promise is told
POLICIES = ("confidence", "margin", "entropy", "never")
#: images shown per depth
SHOWN = 36


@one_thread()
def run(folder: Path, quick: bool, console: Console) -> dict[str, Any]:
    """Write report.json and report.html into `folder`, and return what the JSON holds."""
    started, how = time.perf_counter(), QUICK if quick else Plan()
    with step(console, "read images"):
        found = digits.load(how.seed)
    console.print(f"  {found.source}", soft_wrap=True)
    split = parts(found, how)
    runs = [study(shape, split, how, folder, console) for shape in SHAPES]
    seconds = time.perf_counter() - started
    command = "offramp demo vision" + " --quick" * quick
    body = {
        "format": FORMAT,
        "unit": "image",
        "title": "Early exit on images",
        "model": "; ".join(f"{one['name']}: {one['model']}" for one in runs),
        "data": found.source,
        "runs": runs,
        "seconds": seconds,
        **origin(command, "timm"),
    }
    body |= told(body, [len(part["labels"]) for part in split])
    with step(console, "write the report"):
        save(body, folder)
    return body


def study(shape: Shape, split: list[Part], how: Plan, folder: Path, console: Console) -> dict[str, Any]:
    """Train one classifier with exits, or load it, calibrate and measure it; returns its part of the report."""
    _, chosen, tested = split
    model, fit = fitted(shape, split, how, folder / FITTED / shape.name, console)
    exits = find(model)
    with step(console, f"{shape.name}: record and calibrate: {how.risk} at most {how.alpha:.0%}"):
        first, second = (offramp.record(model, part, batch_size=how.batch) for part in (chosen, tested))
        found = calibrations(first, how, POLICIES)
    made = as_dict(found[POLICIES[0]])
    console.print(f"  {promise(made['certificate'], made['note'])}", soft_wrap=True)
    rows = [policy_row(name, one, second, how.risk) for name, one in found.items()]
    with step(console, f"{shape.name}: measure on the clock"):
        every = batches(tested, how.batch) * how.rounds
        again = second[torch.arange(len(second)).repeat(how.rounds)]
        clock = on_the_clock(exits, rows, found, every, again, console)
    live = next((row["exits"] for row in rows if row["name"] == POLICIES[0] and "exits" in row), None)
    return {
        "name": shape.name,
        "unit": "image",
        "model": f"{shape.told}, exits at {', '.join(map(str, shape.at))} ({shape.head})",
        **made,
        "trace": summary(second, found[POLICIES[0]] if made["certificate"] else None, POLICIES[:-1]),
        "policies": rows,
        "exits": {} if live is None else {d: n // how.rounds for d, n in live.items()},
        "exit_scores": exit_scores(second),
        "images": sheet(tested, second, found[POLICIES[0]].policy),
        "clock": clock,
        "fit": fit,
    }


def sheet(part: Part, trace: offramp.Trace, policy: offramp.ExitPolicy) -> list[dict[str, Any]]:
    """Return the images that left at each depth: how many, how many of them right, and some to show."""
    out, groups = offramp.simulate(trace, policy), []
    right = out.labels == part["labels"]
    for depth in trace.depths:
        rows = (out.depths == depth).nonzero().flatten().tolist()
        full = depth == trace.depths[-1]
        shown = [
            {
                "png": png(part["x"][i]),
                "title": f"a {int(part['labels'][i])}" + ("" if right[i] else f" taken for a {int(out.labels[i])}"),
                "right": bool(right[i]),
            }
            for i in rows[:SHOWN]
        ]
        share = float(right[rows].double().mean()) if rows else None
        name = "full model" if full else f"depth {depth}"
        groups.append({"depth": depth, "name": name, "count": len(rows), "right": share, "shown": shown})
    return groups


def png(image: Tensor) -> str:
    """Return an image [1, row, column] from -1 to 1 as PNG in base64."""
    from PIL import Image

    grey, buffer = ((image[0] + 1) * 127.5).round().clamp(0, 255).byte(), io.BytesIO()
    Image.fromarray(grey.numpy()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def told(body: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """Return the summary and the tiles of the page. sizes: images trained on, calibrated on, tested on."""
    said = [
        f"{body['data']}: {sizes[0]:,} to train on, {sizes[1]:,} to calibrate on, {sizes[2]:,} to test on. Two small "
        "classifiers of timm were trained with exits; images leave where an exit is sure enough."
    ]
    tiles = []
    for one in body["runs"]:
        row, full = one["policies"][0], one["trace"]["full_accuracy"]
        if "speedup" not in row:
            said.append(f"{one['name']}: nothing could be certified, so every image runs the whole model ({full:.1%}).")
            continue
        said.append(
            f"{one['name']}: right on {row['accuracy']:.1%} of the test images (full model {full:.1%}; trained as long "
            f"without exits {one['fit']['accuracy_alone']:.1%}), {row['saved']:.0%} of the blocks do not "
            f"run, {row['speedup']:.2f} times as fast at batch {one['clock']['batch']}."
        )
        batch = one["clock"]["batch"]
        tiles.append((f"{one['name']}, measured", f"{row['speedup']:.2f}×", f"throughput, batch {batch}, certified"))
        tiles.append((f"{one['name']}, accuracy", f"{row['accuracy']:.1%}", f"full model: {full:.1%}"))
    return {"summary": " ".join(said), "tiles": tiles}
