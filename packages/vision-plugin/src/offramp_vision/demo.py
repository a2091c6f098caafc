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
from offramp.stages import LastLayer
from offramp_vision import digits
from offramp_vision.study import QUICK, SHAPES, Moved, Part, Plan, Shape, batches, fresh, parts

#: head and loss of the exits, trained together with the model: LGViT's heads, and the last layer pulls and is pulled
HEAD, HEAD_CONFIG = "lgvit", {"heads": 4}
LOSS: dict[str, Any] = {"curriculum": "none", "weighting": "uniform", "own": 0.3, "pull": 0.3}
#: policies on the clock; the first is the one that is shown, and of which the promise is told
POLICIES = ("confidence", "margin", "entropy", "energy", "patience", "never")
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
    runs = [study(shape, split, how, console) for shape in SHAPES]
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


def study(shape: Shape, split: list[Part], how: Plan, console: Console) -> dict[str, Any]:
    """Train one classifier with exits, calibrate and measure it; returns its part of the report."""
    train, chosen, tested = split
    steps = max(2, round(shape.steps * how.share))
    with step(console, f"{shape.name}: train the {shape.told} without exits, to compare with"):
        alone = accuracy(trained(shape, train, how, steps, exits=False), tested, how.batch)
    with step(console, f"{shape.name}: train it with exits at {', '.join(map(str, shape.at))}"):
        model = trained(shape, train, how, steps, exits=True)
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
        "model": f"{shape.told}, exits at {', '.join(map(str, shape.at))} ({HEAD})",
        **made,
        "trace": summary(second, found[POLICIES[0]] if made["certificate"] else None, POLICIES[:-1]),
        "policies": rows,
        "exits": {} if live is None else {d: n // how.rounds for d, n in live.items()},
        "exit_scores": exit_scores(second),
        "images": sheet(tested, second, found[POLICIES[0]].policy),
        "clock": clock,
        "accuracy_alone": alone,
    }


def trained(shape: Shape, train: Part, how: Plan, steps: int, exits: bool) -> Any:
    """Return the classifier trained with exits on it, or alone, for as many steps."""
    model = fresh(shape, how.seed)
    common: dict[str, Any] = {"steps": steps, "lr": shape.lr, "weight_decay": 0.02, "batch_size": how.batch}
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        if exits:
            offramp.attach(model, shape.at, HEAD, **HEAD_CONFIG)
            offramp.fit(model, Moved(train, how), loss="layerskip", backbone=True, **LOSS, **common)
        else:
            with offramp.attach(model, shape.at[:1], "pooled_linear"):
                offramp.fit(model, Moved(train, how), loss=LastLayer(), backbone=True, **common)
    return model


@torch.no_grad()
def accuracy(model: Any, part: Part, size: int) -> float:
    """Return the share of images on which the full model is right."""
    right = [(model(b["x"]).argmax(-1) == b["labels"]) for b in batches(part, size)]
    return float(torch.cat(right).double().mean())


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
            f"without exits {one['accuracy_alone']:.1%}), {row['saved']:.0%} of the blocks do not "
            f"run, {row['speedup']:.2f} times as fast at batch {one['clock']['batch']}."
        )
        batch = one["clock"]["batch"]
        tiles.append((f"{one['name']}, measured", f"{row['speedup']:.2f}×", f"throughput, batch {batch}, certified"))
        tiles.append((f"{one['name']}, accuracy", f"{row['accuracy']:.1%}", f"full model: {full:.1%}"))
    return {"summary": " ".join(said), "tiles": tiles}
