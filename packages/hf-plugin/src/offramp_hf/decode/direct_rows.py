"""Run windows of a decoder straight through its blocks, for several rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.blocks import state_of
from offramp_hf.backbones.decoder import Decoder
from offramp_hf.cache import GrowingLayer, WindowCache
from offramp_hf.decode.direct import Direct, Unfit
from offramp_hf.decode.place import Place


class DirectRows(Direct):
    """Calls the blocks themselves for several rows, padded or of different length.

    What a row rejected stays in its slots and is masked: moving the others together would copy the whole cache at every
    round, twice the time of the round for eight rows of a 5 M-parameter model.
    """

    holes = True

    def __init__(self, decoder: Decoder, cache: WindowCache) -> None:
        super().__init__(decoder, cache)
        if any(kind == "vector" for kinds in self.kinds for kind in kinds.values()):
            raise Unfit("its blocks take one position for all rows")

    def reach(self, positions: Tensor, slots: int) -> Tensor:
        """Make sure that the tables hold every position below `slots`, without asking the device which are needed."""
        if self.start or slots > self.size:
            self.size = max(self.size, 1 << (slots - 1).bit_length())
            self.prepare(0)
        return positions

    def window(
        self, tokens: Tensor, start: int, stop: int, hidden: Tensor | None, place: Place, frozen: Any = None
    ) -> Tensor:
        """Run blocks start < i <= stop; as `Through.window`."""
        if place.mask is None and place.tree is None:
            return super().window(tokens, start, stop, hidden, place, frozen)
        state: Tensor = self.embed(tokens) if hidden is None else hidden
        slots = self.cache.layers[start].length
        return self.run(start, stop, state, self.around(state, slots, place, self.cache), frozen)

    def other(self, block: nn.Module, hidden: Tensor, layer: GrowingLayer, place: Place, base: int) -> Tensor:
        """Run a copy of the last block; as `Through.other`."""
        if place.mask is None and place.tree is None:
            return super().other(block, hidden, layer, place, base)
        own = WindowCache([layer] * self.decoder.depth)
        return state_of(block(hidden, **self.around(hidden, layer.length, place, own, base)[self.shared[-1]]))
