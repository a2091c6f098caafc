"""`offramp bench vision --perceiver`: exits on a latent branch against exits on the model's own maps, on digits."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import interpolate

import offramp
from offramp.attach import Exits
from offramp.clock import origin
from offramp.errors import BadArgument
from offramp.loss import Schedule
from offramp.record import track
from offramp_vision import digits, perceiver
from offramp_vision._compat import import_timm

#: side of the images; three times what a place sees after the second stage, as in large models at 224 pixels
SIDE = 48
#: images to train on: few, so that exits differ; with 900 all but the worst are right on 97 %
TRAIN = 400
#: widths of the four stages; plain exits are on the same model, and on one so much wider that they cost what latent
#: ones do: pooled_linear 0.4 % less, conv 3 % more
NARROW, WIDE = (16, 24, 32, 48), (21, 34, 52, 76)
#: what is trained: exits ("none", or the name of a head) and the widths of their model
KINDS: Sequence[tuple[str, Sequence[int]]] = (
    ("none", NARROW), ("perceiver", NARROW), ("pooled_linear", NARROW), ("conv", NARROW), ("pooled_linear", WIDE),
    ("conv", WIDE),
)  # fmt: skip
AT = (2, 3)
LATENTS, DEPTHS = 16, (1, 1, 1, 1)


def bench(console: Console, seeds: int = 3, steps: int = 600) -> dict[str, Any]:
    """Train every kind with every seed, print accuracy and cost of each exit, and return plain JSON values."""
    rows = []
    runs = [(kind, widths, seed) for kind, widths in KINDS for seed in range(seeds)]
    each = [trained(kind, widths, n, steps) for kind, widths, n in track(runs, "train and test", console.is_terminal)]
    for n, (kind, widths) in enumerate(KINDS):
        mine = each[n * seeds : (n + 1) * seeds]
        accuracies = [one["accuracy"] for one in mine]
        means = [mean(column) for column in zip(*accuracies, strict=True)]
        rows.append({"name": kind, "widths": list(widths), "accuracy": means, "seeds": accuracies})
        rows[-1]["flops"] = mine[0]["flops"]
    command = f"offramp bench vision --perceiver --repeats {seeds} --steps {steps}"
    body = {"format": 1, "title": "Latent exits", "shapes": rows, **origin(command, "timm")}
    console.print(table(rows))
    console.print(f"{body['machine']}, {body['date']}", soft_wrap=True)
    return body


def trained(kind: str, widths: Sequence[int], seed: int, steps: int) -> dict[str, Any]:
    """Train one model with its exits, and return the accuracy on unseen digits and the cost of each exit and of all."""
    train, test = images(seed)
    model = convnet(widths, seed)
    exits = attached(model, kind)
    options: dict[str, Any] = {"batch_size": 64, "lr": 4e-3, "weight_decay": 0.05, "seed": seed, "progress": False}
    if kind == "none":
        options["weights"] = Schedule("linear", 0.0, 0.0, 1)  # the exits' losses count nothing
    offramp.fit(model, train, loss="perceiver", backbone=True, steps=steps, **options)
    trace = offramp.record(model, test, batch_size=256, costs="flops")
    if trace.targets is None or trace.costs is None:
        raise BadArgument("the digits have lost their labels")
    right = (trace.label == trace.targets[:, None]).double().mean(0).tolist()
    first = len(exits) if kind == "none" else 0  # untrained exits have nothing to show
    return {"accuracy": right[first:], "flops": trace.costs.tolist()[first:]}


def images(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return written and printed digits, larger, in an order of their own: to train on, to test on."""
    found = digits.load(seed)
    large = interpolate(found.images, size=(SIDE, SIDE), mode="bilinear").repeat(1, 3, 1, 1)
    train, test = (
        {"x": large[part], "labels": found.labels[part]} for part in (slice(TRAIN), slice(TRAIN, None))
    )
    return train, test


def convnet(widths: Sequence[int], seed: int) -> nn.Module:
    """Return a small ConvNeXt of four stages with weights of this seed."""
    import_timm()
    from timm.models import ConvNeXt

    torch.manual_seed(seed)
    model: nn.Module = ConvNeXt(
        num_classes=10, depths=(1, 1, 1, 1), dims=widths, kernel_sizes=3, patch_size=2, ls_init_value=None
    )
    return model.eval()


def attached(model: nn.Module, kind: str) -> Exits:
    """Attach the exits of this kind after the second and the third stage."""
    if kind == "perceiver":
        return perceiver.attach(model, LATENTS, at=AT, depths=DEPTHS)
    return offramp.attach(model, AT, "pooled_linear" if kind == "none" else kind)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table for the terminal: accuracy of each exit, mean of the seeds, and its cost."""
    out = Table(box=SIMPLE)
    for n, name in enumerate(("exits", "widths", "first exit", "second exit", "last")):
        out.add_column(name, justify="right" if n else "left")
    for r in rows:
        cells = [f"{a:.1%} at {f / 1e6:.2f} MFLOP" for a, f in zip(r["accuracy"], r["flops"], strict=True)]
        out.add_row(r["name"], "-".join(map(str, r["widths"])), *[""] * (3 - len(cells)), *cells)
    return out
