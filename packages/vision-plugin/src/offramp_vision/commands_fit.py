"""Commands for a timm model and a folder of images: `offramp fit` and `offramp record` with `--model timm/NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli import Json, depths_of, options_from, told_fit, told_trace
from offramp.errors import BadArgument

Model = Annotated[
    str,
    typer.Option(
        "--model", metavar="timm/NAME", help="A model of timm, of a folder or a hub: timm/local-dir:DIR, timm/hf-hub:ID"
    ),
]
Data = Annotated[Path, typer.Option("--data", help="Folder of images, one folder per class.")]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The model's weights, safetensors; default: those timm has for it.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images at once.")]


def fit_vision(
    model: Model,
    data: Data,
    folder: Annotated[Path, typer.Option("--out", help="Directory for the fitted exits.")],
    weights: Weights = None,
    at: Annotated[str, typer.Option(help="Depths or fractions, e.g. 3,6,9 or 0.25,0.5.")] = "0.25,0.5,0.75",
    head: Annotated[str, typer.Option(help="Name of the head.")] = "pooled_linear",
    loss: Annotated[str, typer.Option(help="Name of the loss.")] = "labels",
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch: Batch = 64,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Option NAME=VALUE of the head.")] = None,
    out: Json = None,
) -> None:
    """Attach heads to an image classifier, train them on a folder of images, and save them."""
    import offramp
    from offramp_vision.data import folder as images

    rows = images(data)
    classifier = load(model, weights, len(rows.classes))
    exits = offramp.attach(classifier, depths_of(at), head, **options_from(set_ or []))
    report = offramp.fit(classifier, rows, loss=loss, steps=steps, batch_size=batch, rows=batch)
    told_fit(exits, report, folder, "images", out)


def record_vision(
    model: Model,
    exits: Annotated[str, typer.Option("--exits", help="Directory or hub id that exits.save() wrote.")],
    data: Data,
    trace: Annotated[Path, typer.Option("--out", help="The trace, a safetensors file.")],
    weights: Weights = None,
    batch: Batch = 64,
    out: Json = None,
) -> None:
    """Record what every exit says on a folder of images."""
    import offramp
    from offramp_vision.data import folder as images

    rows = images(data)
    classifier = load(model, weights, len(rows.classes))
    offramp.load(classifier, exits)
    told_trace(offramp.record(classifier, rows, batch_size=batch, progress=True), trace, out)


def load(name: str, weights: Path | None, classes: int) -> Any:
    """Return the model of timm in eval mode, with `weights` for so many classes, or with timm's own; raises
    `BadArgument`."""
    import timm

    kind, _, known = name.partition("/")
    if kind != "timm" or not known:
        raise BadArgument(f"--model {name} is not timm/NAME; write e.g. --model timm/resnet18")
    if weights is not None and weights.suffix != ".safetensors":
        raise BadArgument(f"--weights {weights}: only safetensors are read, for other files can run code when loaded")
    given: dict[str, Any] = {"pretrained": True}
    if weights is not None:
        given = {"checkpoint_path": str(weights), "num_classes": classes}
    try:
        return timm.create_model(known, **given).eval()
    except (RuntimeError, ValueError, OSError) as error:  # unknown, without weights, no network, or of another shape
        raise BadArgument(
            f"{name} cannot be built ({error}); names are in timm.list_models(), and weights of your own are given as "
            f"--weights FILE.safetensors or as a folder: --model timm/local-dir:DIR"
        ) from error
