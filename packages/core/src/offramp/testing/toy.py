"""A toy model and its backbone: the smallest complete plugin, for tests and as an example to copy."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from offramp._hookspecs import hookimpl
from offramp._plugins import plugins
from offramp.backbone import Backbone, Observed, Tap, Undo
from offramp.blocks import BlockSpec, Chain
from offramp.enable import Run
from offramp.engine import SinglePass
from offramp.errors import BadArgument
from offramp.head import Around, HeadContext

NAME = "toy"


class ToyBlock(nn.Module):
    """One residual block that mixes tokens under a mask and counts, in `calls`, the rows of every call not compiled."""

    def __init__(self, width: int, pair: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.pair = pair
        self.calls: list[int] = []

    def forward(self, hidden: Tensor, mask: Tensor) -> Any:
        """Map hidden [batch, token, width] and mask [batch, token] to the next hidden, or (hidden, None) if `pair`."""
        if not torch.compiler.is_compiling():  # what is compiled is compiled once, not once per length of a list
            self.calls.append(hidden.shape[0])
        weight = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)
        x = self.norm(hidden)
        x = x + (x * weight).sum(1, keepdim=True)
        out = hidden + self.down(torch.nn.functional.gelu(self.up(x)))
        return (out, None) if self.pair else out


class ToyModel(nn.Module):
    """A classifier of sequences: linear in, `depth` residual blocks, norm and head on the first token.

    shared: all blocks are one module, run `depth` times; pair: blocks return (hidden, None), as many frameworks' do.
    `config.early_exit` is where the flag of `offramp.enable(model)` goes.
    """

    def __init__(
        self,
        depth: int = 6,
        width: int = 16,
        classes: int = 5,
        inputs: int = 8,
        shared: bool = False,
        pair: bool = False,
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(early_exit=None)
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList([ToyBlock(width, pair)] * depth if shared else _blocks(depth, width, pair))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x [batch, token, inputs] and mask [batch, token] (1 = real) to logits [batch, classes]."""
        hidden = self.features(x, mask)
        out: Tensor = self.head(self.norm(hidden[:, 0]))
        return out

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the last hidden state [batch, token, width]: a second public way in, as real models have."""
        mask = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        hidden = self.embed(x)
        for block in self.blocks:
            out = block(hidden, mask)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden  # type: ignore[no-any-return]

    def calls(self) -> list[list[int]]:
        """Return the rows of every call of every block since the last `calls()`, block by block."""
        blocks = list(dict.fromkeys(self.blocks))
        seen = [list(block.calls) for block in blocks]  # type: ignore[arg-type]
        for block in blocks:
            block.calls.clear()  # type: ignore[operator, union-attr]
        return seen


def _blocks(depth: int, width: int, pair: bool) -> list[nn.Module]:
    return [ToyBlock(width, pair) for _ in range(depth)]


def _same(logits: Tensor) -> Tensor:
    return logits


class ToyBackbone(Backbone):
    """`ToyModel` as a chain of blocks; a batch is a tensor x or a mapping with x, and optionally mask and labels."""

    sequences = True

    def __init__(self, model: ToyModel) -> None:
        self.model: ToyModel = model
        self.names = [f"blocks.{i}" for i in range(len(model.blocks))]

    def taps(self) -> Sequence[Tap]:
        """Return one tap after every block."""
        return [Tap(n, i + 1, self.model.embed.out_features, "batch token width") for i, n in enumerate(self.names)]

    def context(self) -> HeadContext:
        """Return the final norm and the classifier."""
        head = self.model.head
        return HeadContext(self.model.norm, head, _same, head.in_features, head.out_features)

    def chain(self) -> Chain:
        """Return the blocks; their mask is cut with the batch, whether given by place or by name."""
        size = 2 if self.model.blocks[0].pair else None
        return Chain(list(self.model.blocks), BlockSpec("hidden", 0, size, frozenset({(1,), ("mask",)})))

    def pool(self, hidden: Tensor) -> Tensor:
        """Return the first token: [batch, token, width] -> [batch, width]."""
        return hidden[:, 0]

    def call(self, batch: Any) -> Any:
        """Run the model on x and mask; labels are not its business."""
        if isinstance(batch, Mapping):
            return self.model(batch["x"], batch.get("mask"))
        return self.model(batch)

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Return the first token's states at `depths` and at the end, and the labels if there are any."""
        with self.chain().capture([*depths, self.depth]) as kept:
            self.call(batch)
        states = [self.pool(kept[d]) for d in depths]
        final = self.pool(kept[self.depth])
        targets = batch.get("labels") if isinstance(batch, Mapping) else None
        seen = Observed(states, final, targets, sample=torch.arange(len(final)))
        if whole:
            seen.whole, seen.keep = [kept[d] for d in depths], torch.zeros(kept[self.depth].shape[:2], dtype=torch.bool)
            seen.keep[:, 0] = True
            seen.around = Around(torch.arange(seen.keep.shape[1])[None])
        return seen

    def drive(self, run: Run) -> Undo:
        """Exit inside one forward; generation's options have no meaning here and are refused."""
        options = run.options
        generates = options.verify or options.draft is not None or options.rollback is not None
        if generates or options.kv == "schedule":
            raise BadArgument(
                'verify and draft need a model that generates, as do rollback and kv="schedule"; ToyModel answers once '
                "per call"
            )
        return SinglePass(run, self.model.head).install()


@hookimpl
def offramp_adapt(model: nn.Module) -> Backbone | None:
    """Claim every `ToyModel`."""
    return ToyBackbone(model) if isinstance(model, ToyModel) else None


@contextmanager
def toy_plugin() -> Iterator[None]:
    """Register this module as a plugin while the context lasts, so that `offramp.attach(ToyModel(), at=3)` works."""
    report = plugins()
    if NAME in report.loaded:
        yield
        return
    report.manager.register(sys.modules[__name__], NAME)
    report.loaded[NAME] = sys.modules[__name__]
    try:
        yield
    finally:
        report.manager.unregister(name=NAME)
        report.loaded.pop(NAME, None)
