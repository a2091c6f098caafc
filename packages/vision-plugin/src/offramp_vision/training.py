"""Small classifiers trained on digits, alone or with exits; those with exits are kept, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save as pack

import offramp
from offramp.attach import find
from offramp.checkpoint import read_bytes, read_safetensors, sha256, write_bytes, write_text
from offramp.cli import step
from offramp.errors import DamagedFile
from offramp.stages import LastLayer
from offramp_vision.study import Moved, Part, Plan, Shape, batches, fresh

#: loss of model and exits together: all exits in every step; the last layer pulls them, and is pulled
LOSS: dict[str, Any] = {"curriculum": "none", "weighting": "uniform", "own": 0.3, "pull": 1.0}
#: beside the weights: what they were trained with
RECORD, WEIGHTS = "fitted.json", "model.safetensors"


def fitted(shape: Shape, split: list[Part], how: Plan, folder: Path, console: Console) -> tuple[Any, dict[str, Any]]:
    """Return (classifier with exits, how right it is when trained as long without), trained now unless `folder` holds
    the same."""
    train, _, tested = split
    data = sha256(train["x"].numpy().tobytes())
    wanted = json.loads(json.dumps({"shape": shape.fitting(), "plan": how.fitting(), "loss": LOSS, "data": data}))
    found = _read(folder / RECORD)
    model = fresh(shape, how.seed)
    if found is not None and {k: found.get(k) for k in wanted} == wanted:
        console.print(f"{shape.name}: reused what is in {folder}", soft_wrap=True, highlight=False)
        model.load_state_dict(read_safetensors(folder / WEIGHTS)[0])
        offramp.load(model, folder / "exits")
        return model, {**found["fit"], "reused": True}
    with step(console, f"{shape.name}: train the {shape.told} without exits, to compare with"):
        alone = accuracy(trained(shape, train, how, exits=False), tested, how.batch)
    with step(console, f"{shape.name}: train it with exits at {', '.join(map(str, shape.at))}"):
        model = trained(shape, train, how, exits=True)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("exits.")}
    write_bytes(folder / WEIGHTS, pack(own))
    find(model).save(folder / "exits")
    fit = {"accuracy_alone": alone}
    write_text(folder / RECORD, json.dumps({**wanted, "fit": fit}, indent=2))
    return model, {**fit, "reused": False}


def trained(shape: Shape, train: Part, how: Plan, exits: bool) -> Any:
    """Return the classifier trained with exits on it, or alone, for as many steps."""
    model, steps = fresh(shape, how.seed), max(2, round(shape.steps * how.share))
    common: dict[str, Any] = {"steps": steps, "lr": shape.lr, "weight_decay": 0.02, "batch_size": how.batch}
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        if exits:
            offramp.attach(model, shape.at, shape.head, **shape.config)
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


def _read(path: Path) -> dict[str, Any] | None:
    """Return the record beside fitted weights, None where there is none that can be read."""
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, DamagedFile):
        return None
    return found if isinstance(found, dict) else None
