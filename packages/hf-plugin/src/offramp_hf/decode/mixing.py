"""What a head that reads earlier states remembers while a text is generated: its own keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offramp.head import Around
from offramp_hf.cache import GrowingLayer
from offramp_hf.decode.place import Place


class Memory:
    """Keys and values of one head, slot by slot as in the model's cache, and states that it has not read yet.

    mix_in: the head's `mix`, with the layer of the cache that it remembers in; base: slots of the model's cache before
    the first state that the head gets to see.
    """

    def __init__(self, mix_in: Callable[[Tensor, Around, GrowingLayer], Tensor], runner: Any, base: int) -> None:
        self.mix_in, self.runner, self.base = mix_in, runner, base
        self.layer = GrowingLayer()
        self.pending: list[Tensor] = []
        #: what was mixed last, [batch, new, width]
        self.mixed = torch.empty(0)

    def read(self, place: Place) -> Tensor:
        """Mix everything pending and return the newest mixed state [batch, 1, width]."""
        if self.pending:
            hidden = torch.cat(self.pending, 1) if len(self.pending) > 1 else self.pending[0]
            self.pending = []
            self.mixed = self.mix(hidden, place)
        return self.mixed[:, -1:]

    def mix(self, hidden: Tensor, place: Place) -> Tensor:
        """Mix states [batch, new, width] and remember their keys and values."""
        slots, new = self.base + self.layer.length, hidden.shape[1]
        mask = place.seen(slots, new, hidden.device)
        if mask is not None:
            mask = mask[..., self.base :]
        elif place.mask is not None:
            mask = place.mask[:, self.base : slots + new]
        past = self.layer

        def call(block: torch.nn.Module, states: Tensor) -> Tensor:
            state: Tensor = self.runner.other(block, states, past, place, self.base)
            return state

        return self.mix_in(hidden, Around(place.positions(slots, new, hidden.device), mask, past, call), past)

    def catch_up(self, slots: int, place: Place) -> None:
        """Read what is pending when the first `slots` slots of the model's cache reach into it, else forget it."""
        if slots > self.base + self.layer.length:
            self.read(place)
        self.pending = []

    def pick(self, start: int, path: Tensor) -> None:
        """Keep the slots `start + path` behind the first `start` ones; path: int64 [batch, n]."""
        self.layer.pick(start - self.base, path)

    def crop(self, slots: int) -> None:
        """Forget what stands behind the first `slots` slots of the model's cache."""
        keep = max(0, slots - self.base)
        over = self.layer.length + sum(p.shape[1] for p in self.pending) - keep
        while over > 0 and self.pending:
            last = self.pending.pop()
            if last.shape[1] > over:
                self.pending.append(last[:, : last.shape[1] - over])
            over -= last.shape[1]
        self.layer.crop_to(keep)

    def gather(self, index: Tensor, place: Place) -> None:
        """Reorder slots per row as the model's cache does. index: int64 [batch, slots] into its slots."""
        self.read(place)
        own = (index[:, self.base :] - self.base).clamp(min=0)
        self.layer.gather(own.clamp(max=self.layer.length - 1))
