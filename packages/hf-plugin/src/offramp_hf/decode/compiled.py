"""Run windows of a decoder through blocks that torch compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.blocks import state_of
from offramp.compiled import check_compiler, compiled
from offramp.errors import BadArgument
from offramp.kernels._select import not_built
from offramp.options import Options
from offramp_hf.backbones.decoder import Decoder
from offramp_hf.decode.direct import FEW, Direct


class Behind:
    """The cache that a compiled block sees: its new keys and values go into the last slots of what it is given."""

    def __init__(self, keys: Tensor, values: Tensor, new: int) -> None:
        self.keys, self.values, self.new = keys, values, new

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values and return all of them."""
        self.keys[:, :, -self.new :].copy_(key)
        self.values[:, :, -self.new :].copy_(value)
        return self.keys, self.values


def run_block(
    block: nn.Module, state: Tensor, keys: Tensor, values: Tensor, arguments: dict[str, Any], cache: str
) -> Tensor:
    """Return the state after a block whose argument `cache` holds keys and values with room for the new tokens."""
    return state_of(block(state, **arguments, **{cache: Behind(keys, values, state.shape[1])}))


def single(decoder: Decoder) -> type[Direct]:
    """Return what runs windows of one row: with compile=True compiled blocks, but recordings that multiply in C++ on a
    CPU.

    Those take 15 ms to make, and four seconds once for every model of this machine. For one token 12 blocks of a
    5 M-parameter model take 1.9 ms from recordings on a Xeon, and 2.1 ms compiled as one graph, which takes 29 s to
    make; with products in C++ they are 1.7 times as fast on an EPYC.
    """
    return Compiled if decoder.compiled and not _on_cpu(decoder) else Direct


def check_compile(decoder: Decoder, options: Options) -> None:
    """Raise `BadArgument` where compile=True would change nothing, or where what compiles is missing."""
    if not options.compile:
        return
    what = type(decoder.model).__name__
    if decoder.kind != Decoder.kind or not decoder.direct_fits:
        raise BadArgument(
            f"compile=True runs the blocks of a decoder one by one, and those of {what} run inside its own forward; "
            f"leave compile out"
        )
    if not _on_cpu(decoder):
        check_compiler({"cuda"})
    elif (why := not_built("linear")) is not None:
        raise BadArgument(f"compile=True multiplies in C++ on a CPU, and {why}; or leave compile out")


def _on_cpu(decoder: Decoder) -> bool:
    device: torch.device = decoder.model.get_input_embeddings().weight.device
    return device.type == "cpu"


class Compiled(Direct):
    """`Direct` with compiled blocks; calls of up to FEW new tokens, longer ones come once and run as they are.

    All blocks of a kind share two pieces of code, for one new token and for several: how many there are, and how many
    stand in the cache, are symbols in it. Equal to the model's own up to rounding, where recordings are to the bit.
    """

    @contextmanager
    def running(self) -> Iterator[None]:
        """As `Direct.running`, but the framework's own norms and attention stay: the compiler makes them quick."""
        self.masks = {}
        # each block carries its number, and code for each number would be code for each block
        numbers = torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
        with torch.inference_mode(), numbers:
            yield

    def run(self, start: int, stop: int, state: Tensor, groups: list[dict[str, Any]], frozen: Any = None) -> Tensor:
        """Run blocks start < i <= stop with these arguments; as `Direct.run`."""
        new = state.shape[1]
        if self.cache.only_store or new > FEW:
            return super().run(start, stop, state, groups, frozen)
        step = compiled(run_block, dynamic=True)
        caches = [next(name for name, kind in kinds.items() if kind == "cache") for kinds in self.kinds]
        given = [{k: v for k, v in g.items() if k != cache} for g, cache in zip(groups, caches, strict=True)]
        for index in range(start, stop):
            kind = self.shared[index]
            keys, values = self.cache.layers[index].room(new)
            state = step(self.decoder.blocks[index], state, keys, values, given[kind], caches[kind])
            if frozen is not None:
                state = torch.where(frozen[0][:, None, None], frozen[1], state)
        return state
