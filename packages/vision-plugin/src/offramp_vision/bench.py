"""`offramp bench vision`: time saved over what the skipped blocks would have cost, with the heads' own time counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import offramp
from offramp.attach import Exits
from offramp.clock import Clocked, Early, Timed, interleaved, origin, quartiles, sync
from offramp.errors import BadArgument
from offramp.memory import Peak
from offramp.policy import Evidence, ExitPolicy, State
from offramp_vision._compat import import_timm
from offramp_vision.backbones._images import noise

#: one of each shape: a chain of equal blocks, a convnet, a hierarchy of windows
MODELS = ("vit_small_patch16_224", "resnet50", "swin_tiny_patch4_window7_224")
BATCHES = (1, 16, 64, 256)
#: depths at which images leave, as shares of the depth; a quarter of them runs to the end
AT = (0.25, 0.5, 0.75)
#: images to begin with, and those whose states heads are clocked on, again and again: what they show takes no time
FEW = 16


@dataclass(frozen=True)
class Ask:
    """What to measure: models of timm, each with random weights, at each number of images per batch.

    repeats: measured runs of each way; of an image alone, which takes a 64th of the time, 16 times as many.
    """

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
        """Say at which exit each image leaves; the number after the last: at none."""
        return {"leaves": torch.tensor([(row + (batch == 1)) % (len(AT) + 1) for row in range(batch)], device=device)}

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the images whose turn it is."""
        return state["leaves"] <= seen.index, state


class Parts(Clocked):
    """The model on the first `rows` images; clocks each of its parts: up to the end of each block, and what follows.

    A part begins where the one before it ended, so that what runs between blocks is in it.
    """

    def __init__(self, blocks: Sequence[nn.Module], model: nn.Module, rows: int) -> None:
        super().__init__(blocks, lambda images: model(images[:rows]))

    def start(self, *args: Any) -> None:
        """Let the clock run: the part has begun already."""

    def stopper(self, index: int) -> Callable[..., None]:
        """Return the hook that stops the clock of one part and starts that of the next."""
        stop = super().stopper(index)

        def stop_and_start(*args: Any) -> None:
            stop(*args)
            self.started = time.perf_counter()

        return stop_and_start

    def __call__(self, images: Any) -> Any:
        """Run once."""
        self.started = time.perf_counter()
        result = super().__call__(images)
        sync()
        self.kept[-1].append(time.perf_counter() - self.started)
        return result


def made(name: str) -> nn.Module:
    """Return a model of timm with random weights, the same each time."""
    torch.manual_seed(0)
    model: nn.Module = import_timm().create_model(name, num_classes=1000).eval()
    return model


@torch.no_grad()
def weighed(model: nn.Module, batch: int, head: str) -> dict[str, int | None]:
    """Return the most memory that one call on a batch of noise takes, in bytes above what was held before, with exits
    and in full; None where the system does not say."""
    images, found = noise(model, batch), []
    with offramp.attach(model, AT, head) as exits:
        for way in (Early(model, Evenly()), Parts(exits.backbone.chain().blocks, model, batch)):
            with way.ready():
                way(images[:FEW])  # what stays from a first call, scratch memory of kernels, is not of this one
            with way.ready(), Peak() as peak:
                way(images)
            found.append(peak.taken)
    return dict(zip(("peak_bytes", "peak_bytes_full"), found, strict=True))


def bench(ask: Ask, console: Console) -> dict[str, Any]:
    """Measure every model at every batch, print the table, and return plain JSON values."""
    timm = import_timm()
    known = set(timm.list_models())
    if odd := [name for name in ask.models if name not in known]:
        raise BadArgument(f"timm has no model called {', '.join(odd)}; see timm.list_models()")
    # all of them on the scales before the first is clocked: what was kept for the clock is in pieces, and weighs more
    asked = [(name, batch) for name in ask.models for batch in ask.batches]
    peaks = [weighed(made(name), batch, ask.head) for name, batch in asked]
    rows = []
    for (name, batch), peak in zip(asked, peaks, strict=True):
        rows.append({"name": name, "batch": batch, "head": ask.head, **measured(made(name), batch, ask), **peak})
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

    ideal: what a model cut by hand takes for each image (measured beside it for one image, ViT-S: the same within 1 %).
    Every block takes what it takes in a batch of just the images that are left, which never held others: a smaller
    batch takes less time per image where memory is the limit, and so the time of the full batch times the share of
    images would be another model's. The model's own readout is on all images, for each is read out once wherever it
    leaves; heads cost more than that where they let images pass. heads: time of all heads on the images that reach
    them, in the measured time already.
    """
    images, repeats = noise(model, batch), ask.repeats * (FEW if batch == 1 else 1)
    with offramp.attach(model, AT, ask.head) as exits:
        early, depth = Early(model, Evenly()), exits.backbone.depth
        left = _left(torch.tensor([*exits.at, depth])[Evenly().start(batch, "cpu")["leaves"]], depth)
        parts = {rows: Parts(exits.backbone.chain().blocks, model, rows) for rows in {batch, *left} - {0}}
        ways: dict[str, Any] = {"early": early, **{str(rows): way for rows, way in parts.items()}}
        timed = interleaved(ways, [images] * repeats, warm=1)
        kept = {rows: way.kept[-repeats:] for rows, way in parts.items()}
        ideal = [sum(kept[n][r][i] for i, n in enumerate([*left, batch]) if n) for r in range(repeats)]
        heads = _heads(exits, images, left, ask.repeats)
    return _row(timed[str(batch)], timed["early"], ideal, heads, early.stats.saved, batch)


def _left(depths: Tensor, depth: int) -> list[int]:
    """Return how many images are left in each block. depths: of each image [rows]; depth: the model's."""
    return [int((depths > block).sum()) for block in range(depth)]


def _heads(exits: Exits, images: Tensor, left: Sequence[int], repeats: int) -> float:
    """Return the seconds that all heads take on the images that reach them; 0 for those that nothing reaches."""
    with exits.backbone.chain().capture(exits.at) as kept:
        exits.backbone.call(images[:FEW])
    total = 0.0
    for depth in exits.at:
        rows = left[depth - 1]
        if not rows:
            continue
        state, head = kept[depth][torch.arange(rows) % FEW % len(images)], exits[depth]
        ways = {"head": lambda given, head=head: head(head.reduce(given) if type(head).whole else given)}
        given = state if type(head).whole else exits.backbone.pool(state)
        total += statistics.median(t.seconds for t in interleaved(ways, [given] * max(3, repeats), warm=1)["head"])
    return total


def _row(
    full: Sequence[Timed], early: Sequence[Timed], ideal: Sequence[float], heads: float, saved: float, batch: int
) -> dict[str, Any]:
    """Return medians; ratios are taken repeat by repeat, so that a slow moment of the machine cancels out."""
    middle = statistics.median
    ratios = [(f.seconds - e.seconds) / (f.seconds - i) for f, e, i in zip(full, early, ideal, strict=True)]
    seconds = middle(t.seconds for t in full), middle(t.seconds for t in early)
    return {
        "images_per_second_full": batch / seconds[0],
        "images_per_second": batch / seconds[1],
        "images_per_second_ideal": batch / middle(ideal),
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
    names = ("model", "batch", "full", "exits", "ideal", "speed", "blocks saved", "heads", "memory", "realised / ideal")
    for n, name in enumerate(names):
        out.add_column(name, justify="right" if n else "left")
    for r in rows:
        rates = [f"{r[k]:.2f}/s" for k in ("images_per_second_full", "images_per_second", "images_per_second_ideal")]
        share = f"{r['heads_seconds'] / r['seconds_full']:.1%}"
        memory = f"{r['peak_bytes'] / r['peak_bytes_full']:.1%}" if r["peak_bytes_full"] else "unknown"
        out.add_row(
            r["name"], str(r["batch"]), *rates, f"{r['speedup']:.2f}x", f"{r['blocks_saved']:.0%}", share, memory,
            f"{r['realised']:.3f}",
        )  # fmt: skip
    return out
