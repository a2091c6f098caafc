"""`offramp bench heads`: LGViT's heads against linear ones, on the same frozen classifiers, over several seeds."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import offramp
from offramp.cli import step
from offramp.clock import one_thread, origin
from offramp_vision import digits
from offramp_vision.study import SHAPES, Part, Plan, Shape, parts
from offramp_vision.training import trained

#: depths of the exits: four, for which LGViT has two kinds of heads in two forms each
AT = {"ViT": (1, 2, 3, 4), "CNN": (3, 5, 7, 9)}
#: ways to train exits of a frozen model: head, its options, loss
WAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "pooled_linear": ("pooled_linear", {}, "labels"),
    "lgvit, labels": ("lgvit", {"heads": 4}, "labels"),
    "lgvit": ("lgvit", {"heads": 4}, "lgvit"),
}


@dataclass(frozen=True)
class Ask:
    """What to measure. seeds: how many, each with its own split and weights; steps: of the heads; share: of the
    classifier's training steps."""

    seeds: int = 3
    steps: int = 100
    share: float = 0.75


@one_thread()
def bench(ask: Ask, console: Console) -> dict[str, Any]:
    """Train, print the table of accuracies, and return plain JSON values."""
    rows = []
    for shape in SHAPES:
        found: dict[str, list[list[float]]] = {name: [] for name in WAYS}
        for seed in range(1, ask.seeds + 1):
            with step(console, f"{shape.name}, seed {seed}"):
                how = Plan(seed=seed, share=ask.share)
                for name, said in exits_of(shape, how, parts(digits.load(seed), how), ask.steps).items():
                    found[name].append(said)
        rows += [_row(shape, name, one) for name, one in found.items()]
    given = {f.name: getattr(ask, f.name) for f in dataclasses.fields(ask)}
    command = "offramp bench heads" + "".join(f" --{k} {v:g}" for k, v in given.items() if v != getattr(Ask, k))
    body = {"format": 1, "title": "Heads of image classifiers", "heads": rows, **given, **origin(command, "timm")}
    console.print(*tables(rows))
    console.print(f"{body['command']}: {body['machine']}, {body['date']}", soft_wrap=True)
    return body


def exits_of(shape: Shape, how: Plan, split: list[Part], steps: int) -> dict[str, list[float]]:
    """Return by way how right each exit is on the test images, and last the full model, of one classifier."""
    train, _, tested = split
    model, out = trained(shape, train, how, exits=False), {}
    for name, (head, options, loss) in WAYS.items():
        with offramp.attach(model, AT[shape.name], head, **options):
            common: dict[str, Any] = {"batch_size": how.batch, "seed": how.seed, "progress": False}
            offramp.fit(model, train, loss=loss, steps=steps, lr=2e-3, rows=how.batch, **common)
            trace = offramp.record(model, tested, batch_size=how.batch)
        right = trace.label == tested["labels"][:, None]
        out[name] = right.double().mean(0).tolist()
    return out


def _row(shape: Shape, way: str, said: list[list[float]]) -> dict[str, Any]:
    """Return the mean over seeds of each exit's accuracy, and their spread."""
    columns = list(zip(*said, strict=True))
    spread = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
    means = [statistics.mean(c) for c in columns]
    body = {"model": shape.name, "way": way, "depths": list(AT[shape.name])}
    return {**body, "accuracy": means, "spread": spread, "seeds": said}


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Return a table per classifier: mean accuracy of every exit, and its spread over seeds."""
    out = []
    for shape in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == shape]
        title = f"{shape}, frozen: accuracy of exits in percent, mean of {len(mine[0]['seeds'])} seeds"
        table = Table(title=title, box=SIMPLE)
        for n, name in enumerate(("heads and loss", *(f"depth {d}" for d in mine[0]["depths"]), "full model")):
            table.add_column(name, justify="right" if n else "left", no_wrap=True)
        for row in mine:
            cells = zip(row["accuracy"], row["spread"], strict=True)
            table.add_row(row["way"], *(f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in cells))
        out.append(table)
    return out
