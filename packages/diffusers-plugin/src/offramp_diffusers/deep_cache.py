"""Run the deep blocks only at every few steps, and in between add what they added last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from offramp._plugins import adapt, part
from offramp.blocks import Call
from offramp.errors import BadArgument
from offramp_diffusers.backbones.transformer import Streams
from offramp_diffusers.backbones.unet import UNetBackbone


@contextmanager
def deep_cache(model: Any, after: int, interval: int) -> Iterator[None]:
    """Run the blocks behind the first `after` at every `interval`-th call only, while the context lasts.

    model: a diffusion transformer or its pipeline, one image or one batch from its first step to its last within the
    context; on top of exits: first `offramp.enable`. In between, what the deep blocks added to the state at their last
    call is added again. Raises `BadArgument`, `UnsupportedModel`. Paper: DeepCache (arXiv 2312.00858), whose U-Net
    keeps the deep state itself, because shallow states reach the end by its skip connections; a chain has none, so
    what is kept is the residual.
    """
    model = part(model)
    backbone = adapt(model)
    if isinstance(backbone, UNetBackbone):
        raise BadArgument(f"states of {type(model).__name__} change their size from block to block: nothing to add")
    depth = backbone.depth
    if not _whole(after) or not _whole(interval) or not 1 <= after < depth or interval < 2:
        raise BadArgument(f"deep_cache({after}, {interval}): give after from 1 to {depth - 1} and interval from 2 on")
    chain: Any = backbone.chain()
    undo = chain.install(DeepCache(chain, after, interval).block)
    try:
        yield
    finally:
        undo()


class DeepCache:
    """What is kept between two calls: how many there were, and what the deep blocks added last."""

    #: how `offramp.enable` knows, and names, what stands in for blocks
    cache = "deep_cache"

    def __init__(self, chain: Streams, after: int, interval: int) -> None:
        self.streams, self.after, self.interval = chain.streams, after, interval
        self.calls = -1
        self.came = torch.empty(0)
        #: None while a call fills it
        self.added: Tensor | None = None

    def block(self, index: int, call: Call) -> Any:
        """Run a block, or hand on the state; the first deep block adds what all of them would."""
        self.calls += index == 0
        if index < self.after:
            return call.run()
        stream = self.streams[index]
        if index == self.after:
            self.came = stream.read(call)
            if self.calls % self.interval == 0 or self.added is None or self.added.shape != self.came.shape:
                self.added = None
            else:
                return stream.facts.pack(self.came + self.added, stream.text(call))
        if self.added is not None:
            return stream.skip(call)
        output = call.run()
        if index + 1 == len(self.streams):
            self.added = stream.facts.state_of(output) - self.came
        return output


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
