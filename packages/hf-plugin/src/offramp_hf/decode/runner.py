"""Run windows of a decoder on new tokens through the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.blocks import Call, state_of
from offramp_hf.backbones.decoder import Decoder
from offramp_hf.cache import GrowingLayer, Stored, WindowCache, additive
from offramp_hf.decode.place import Place


class Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Raised at the end of a window: nothing behind it is wanted."""


class Through:
    """Runs a window by calling the model: embeddings, masks and positions are the model's own, for every
    architecture.
    """

    #: see `Direct.holes`; many models count positions by slots
    holes = False
    #: calls that recordings were made or compared in
    learned = 0

    def __init__(self, decoder: Decoder, cache: WindowCache, inputs: dict[str, Any]) -> None:
        self.decoder, self.cache, self.inputs = decoder, cache, inputs
        name = decoder.position_name
        self.position_name = name if name is not None and decoder.takes(name) else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything happens inside this context; the model's own forward may make buffers that outlive the call."""
        with torch.no_grad():
            yield

    def window(
        self,
        tokens: Tensor,
        start: int,
        stop: int,
        hidden: Tensor | None,
        place: Place,
        frozen: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Run blocks start < i <= stop on `tokens` [batch, n] from `hidden` [batch, n, width] (None at start 0).

        frozen: (rows [batch] bool, their states): rows whose state stays while their keys and values are stored.
        Returns the state after block `stop`.
        """
        kept: list[Tensor] = []

        def handler(index: int, call: Call) -> Any:
            if index < start:
                return self.decoder.skipped(index, call, self.cache)
            output = call.run(hidden if index == start and hidden is not None else None)
            state = state_of(output)
            if frozen is not None:
                state = torch.where(frozen[0][:, None, None], frozen[1], state)
                output = (state, *output[1:]) if isinstance(output, tuple) else state
            if index + 1 == stop:
                kept.append(state)
                raise Stop
            return output

        self._forward(tokens, start, place, handler)
        return kept[0]

    def fill(self, tokens: Tensor, start: int, hidden: Tensor, place: Place) -> None:
        """Store keys and values of `hidden` in every block from `start` on, by each block's own projections (CALM)."""

        def handler(index: int, call: Call) -> Any:
            if index < start:
                return self.decoder.skipped(index, call, self.cache)
            try:
                call.run(hidden)
            except Stored:
                pass
            if index + 1 == self.decoder.depth:
                raise Stop
            return self.decoder.skipped(index, call, self.cache)

        self.cache.only_store = True
        try:
            self._forward(tokens, start, place, handler)
        finally:
            self.cache.only_store = False

    def other(self, block: nn.Module, hidden: Tensor, layer: GrowingLayer, place: Place, base: int) -> Tensor:
        """Run a copy of the last block on `hidden` [batch, n, width] as the model would, with keys and values in
        `layer`, whose first slot is slot `base` of the model's cache."""
        kept: list[Tensor] = []

        def handler(index: int, call: Call) -> Any:
            if index + 1 < self.decoder.depth:
                return call.skip()
            kept.append(call.through(block, hidden))
            raise Stop

        own = self.cache
        self.cache = WindowCache([layer] * self.decoder.depth)
        mask = None if place.mask is None else place.mask[:, base:]
        try:
            self._forward(hidden.new_zeros(hidden.shape[:2], dtype=torch.long), 0, place.shifted(mask, base), handler)
        finally:
            self.cache = own
        return kept[0]

    def _forward(self, tokens: Tensor, start: int, place: Place, handler: Callable[[int, Call], Any]) -> None:
        inputs = dict(self.inputs)
        slots, new = self.cache.layers[start].get_seq_length(), tokens.shape[1]
        seen = place.seen(slots, new, tokens.device)
        if seen is not None:
            inputs[self.decoder.mask_name] = additive(seen, self.decoder.model.dtype)
        elif place.mask is not None:
            inputs[self.decoder.mask_name] = place.mask[:, : slots + new]
        if self.position_name is not None:
            inputs[self.position_name] = place.positions(slots, new, tokens.device)
        undo = self.decoder.chain().install(handler)
        try:
            with self.cache.seen_from(start):
                self.decoder.forward(tokens, self.cache, inputs)
        except Stop:
            pass
        finally:
            undo()
