"""Calls of a decoder block as functions of tensors, for recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offramp.blocks import state_of
from offramp_hf.backbones._replay import Example
from offramp_hf.cache import GrowingLayer

#: calls of more new tokens are not recorded: their time is in the products
FEW = 16


class Unrecordable(Exception):  # noqa: N818  (a signal, not an error)
    """A block does what no recording can repeat; says what."""


class Slots:
    """The cache that a module sees while it is recorded: its new keys and values go behind the stored ones."""

    def __init__(self, keys: Tensor, values: Tensor, new: int, index: int = 0) -> None:
        self.keys, self.values, self.new, self.index, self.updates = keys, values, new, index, 0

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values into the last slots and return all of them."""
        if layer_idx != self.index:
            raise Unrecordable(f"block {self.index} stores keys for block {layer_idx}")
        self.updates += 1
        self.keys[:, :, -self.new :].copy_(key)
        self.values[:, :, -self.new :].copy_(value)
        return self.keys, self.values


@dataclass(frozen=True)
class Given:
    """Keyword arguments of a block call, and the tensors among them in the order in which `rebuild` puts them back.

    kinds: what each argument is, as `Direct` found it; key: what a recording is good for: where tensors stand, and the
    shape of the mask but for its slots.
    """

    arguments: dict[str, Any]
    kinds: dict[str, str]
    tensors: tuple[Tensor, ...]
    key: tuple[Any, ...]

    @classmethod
    def of(cls, arguments: dict[str, Any], kinds: dict[str, str]) -> Given:
        """Take a block's arguments apart."""
        tensors: list[Tensor] = []
        key: list[Any] = []
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                tensors.append(value)
                key.append(tuple(value.shape[:-1]) if kinds[name] == "mask" else name)
            elif isinstance(value, tuple):
                tensors += value
                key.append((name, len(value)))
            else:
                key.append(None if kinds[name] == "cache" else value)
        return cls(arguments, kinds, tuple(tensors), tuple(key))

    def rebuild(self, tensors: Sequence[Tensor], cache: Any) -> dict[str, Any]:
        """Return the same arguments with other tensors, and `cache` where the cache was."""
        left = iter(tensors)
        out: dict[str, Any] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                out[name] = next(left)
            elif isinstance(value, tuple):
                out[name] = tuple(next(left) for _ in value)
            else:
                out[name] = cache if self.kinds[name] == "cache" else value
        return out

    def example(self, block: nn.Module, index: int, state: Tensor, layer: GrowingLayer) -> Example:
        """Return a call that has just been made on `state` [batch, new, width] as a function of (state, keys, values,
        tensors)."""
        new = state.shape[1]

        def function(state: Tensor, keys: Tensor, values: Tensor, *tensors: Tensor) -> Tensor:
            cache = Slots(keys, values, new, index)
            out = state_of(block(state, **self.rebuild(tensors, cache)))
            if cache.updates != 1:
                raise Unrecordable(f"block {index} stores keys {cache.updates} times")
            return out

        masks = {id(v) for k, v in self.arguments.items() if self.kinds[k] == "mask"}
        shorter = [t[..., 1:] if id(t) in masks else t for t in self.tensors]
        inputs = [state, layer.keys, layer.values, *self.tensors]
        other = [state, layer.keys[:, :, 1:], layer.values[:, :, 1:], *shorter]
        return Example(function, inputs, other, (new == 1, tuple(self.arguments)))


def recordable(state: Tensor, layer: GrowingLayer) -> bool:
    """Whether a call on `state` [batch, new, width] is worth recording, and can be with one slot less."""
    return state.dim() == 3 and state.shape[1] <= FEW and layer.length > 2 * state.shape[1]
