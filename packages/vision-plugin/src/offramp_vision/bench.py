"""`offramp bench vision`: time saved over what the skipped blocks would have cost, with the heads' own time counted."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import offramp
from offramp.attach import Exits
from offramp.clock import Clocked, Timed, interleaved, origin, quartiles
from offramp.errors import BadArgument
from offramp.policy import Evidence, ExitPolicy, State
from offramp_vision.backbones._images import noise

#: one of each shape: a chain of equal blocks, a convnet, a hierarchy of windows
MODELS = ("vit_small_patch16_224", "resnet50", "swin_tiny_patch4_window7_224")
BATCHES = (1, 16, 64, 256)
#: depths at which images leave, as shares of the depth; a quarter of them runs to the end
AT = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Ask:
    """What to measure: models of timm, each with random weights, at each number of images per batch."""

    models: Sequence[str] = MODELS
    batches: Sequence[int] = BATCHES
    head: str = "pooled_linear"
    repeats: int = 3


@dataclass(frozen=True)
class Evenly(ExitPolicy):
    """A quarter of the images leaves at each of three exits, whatever they show: only for measuring.

    Heads run on every image that reaches them, as they do for confidence; an image alone leaves halfway.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"top1"})

    def start(self, batch: int, device: torch.device | str) -> State:
        """Number the images."""
        return {"row": torch.arange(batch, device=device) + (batch == 1)}

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the images whose turn it is."""
        return state["row"] % (len(AT) + 1) <= seen.index, state


class Early:
    """A call of the model with exits, enabled outside the clock."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.stats = model, offramp.Stats()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Enable the policy."""
        with offramp.enable(self.model, Evenly()) as run:
            run.stats = self.stats
            yield

    def __call__(self, images: Tensor) -> Any:
        """Run the model."""
        return self.model(images)


def bench(ask: Ask, console: Console) -> dict[str, Any]:
    """Measure every model at every batch, print the table, and return plain JSON values."""
    import timm

    known = set(timm.list_models())
    if odd := [name for name in ask.models if name not in known]:
        raise BadArgument(f"timm has no model called {', '.join(odd)}; see timm.list_models()")
    rows = []
    for name in ask.models:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=1000).eval()
        for batch in ask.batches:
            rows.append({"name": name, "batch": batch, "head": ask.head, **measured(model, batch, ask)})
            console.print(f"  [dim]{name}, batch {batch}: {rows[-1]['realised']:.3f}[/]")
    command = "offramp bench vision " + " ".join(f"--model {m}" for m in ask.models)
    command += "".join(f" --batch {b}" for b in ask.batches) + f" --head {ask.head} --repeats {ask.repeats}"
    body = {"format": 1, "title": "Image classifiers", "shapes": rows, **origin(command, "timm")}
    console.print(table(rows))
    console.print(f"{body['machine']}, {body['date']}", soft_wrap=True)
    return body


@torch.no_grad()
def measured(model: nn.Module, batch: int, ask: Ask) -> dict[str, Any]:
    """Return what leaving saves on one batch of noise: medians over repeats.

    ideal: for each block, its measured time at the full batch times the share of images that had left before it;
    heads: time of all heads on the images that reach them, in the saved time already.
    """
    images = noise(model, batch)
    with offramp.attach(model, AT, ask.head) as exits:
        chain = exits.backbone.chain()
        clock, early = Clocked(chain.blocks, model), Early(model)
        timed = interleaved({"full": clock, "early": early}, [images] * ask.repeats, warm=1)
        gone = _gone(early.stats.last_depths, exits.backbone.depth)
        ideal = [sum(s * g for s, g in zip(one, gone, strict=True)) for one in clock.kept[-ask.repeats :]]
        heads = _heads(exits, images, gone, ask.repeats)
    return _row(timed["full"], timed["early"], ideal, heads, early.stats.saved, batch)


def _gone(depths: Tensor, depth: int) -> list[float]:
    """Return the share of images that have left before each block. depths: of each image [rows]; depth: the model's."""
    return [float((depths <= block).double().mean()) for block in range(depth)]


def _heads(exits: Exits, images: Tensor, gone: Sequence[float], repeats: int) -> float:
    """Return the seconds that all heads take on the images that reach them; 0 for those that nothing reaches."""
    with exits.backbone.chain().capture(exits.at) as kept:
        exits.backbone.call(images)
    total = 0.0
    for depth in exits.at:
        state = kept[depth][: round(len(images) * (1 - gone[depth - 1]))]
        if not len(state):
            continue
        head: Any = exits[depth]
        ways = {"head": lambda given, head=head: head(head.reduce(given) if type(head).whole else given)}
        given = state if type(head).whole else exits.backbone.pool(state)
        total += statistics.median(t.seconds for t in interleaved(ways, [given] * max(3, repeats), warm=1)["head"])
    return total


def _row(
    full: Sequence[Timed], early: Sequence[Timed], ideal: Sequence[float], heads: float, saved: float, batch: int
) -> dict[str, Any]:
    """Return medians; ratios are taken repeat by repeat, so that a slow moment of the machine cancels out."""
    middle = statistics.median
    gains = [a.seconds - b.seconds for a, b in zip(full, early, strict=True)]
    ratios = [gain / cost for gain, cost in zip(gains, ideal, strict=True)]
    seconds = middle(t.seconds for t in full), middle(t.seconds for t in early)
    return {
        "images_per_second_full": batch / seconds[0],
        "images_per_second": batch / seconds[1],
        "images_per_second_ideal": batch / (seconds[0] - middle(ideal)),
        "speedup": middle(a.seconds / b.seconds for a, b in zip(full, early, strict=True)),
        "blocks_saved": saved,
        "heads_seconds": heads,
        "seconds_full": seconds[0],
        "ideal_seconds": middle(ideal),
        "realised": middle(ratios),
        "realised_quartiles": quartiles(ratios),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table for the terminal: images per second of the full model, with exits, and at the ideal."""
    out = Table(box=SIMPLE)
    names = ("model", "batch", "full", "exits", "ideal", "speed", "blocks saved", "heads", "realised / ideal")
    for n, name in enumerate(names):
        out.add_column(name, justify="right" if n else "left")
    for r in rows:
        rates = [f"{r[k]:.2f}/s" for k in ("images_per_second_full", "images_per_second", "images_per_second_ideal")]
        share = f"{r['heads_seconds'] / r['seconds_full']:.1%}"
        out.add_row(
            r["name"], str(r["batch"]), *rates, f"{r['speedup']:.2f}x", f"{r['blocks_saved']:.0%}", share,
            f"{r['realised']:.3f}",
        )  # fmt: skip
    return out
