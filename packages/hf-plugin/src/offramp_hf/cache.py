"""Key-value caches for windows: layers of different length, grown in place, cropped for free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

#: slots added when a layer is full; at 256 the copy of a long cache happens once per 256 tokens instead of at every
#: token
CHUNK = 256


class Stored(Exception):  # noqa: N818  (a signal, not an error)
    """Raised inside a block once its keys and values are stored, when nothing else of the block is wanted."""


class GrowingLayer(DynamicLayer):
    """A cache layer whose keys and values live in a buffer with room to grow: [batch, heads, slots, head_dim].

    Appending copies only the new tokens and cropping copies nothing; `DynamicLayer` copies the whole cache at every
    token.
    """

    is_initialized: bool

    def __init__(self, sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = sliding
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new keys and values and return all of them."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self.buffers = [self._empty(t, 0) for t in (key_states, value_states)]
        start, new = self.length, key_states.shape[-2]
        self.room(new)
        self.buffers[0].narrow(-2, start, new).copy_(key_states)
        self.buffers[1].narrow(-2, start, new).copy_(value_states)
        return self.keys, self.values

    def room(self, new: int) -> tuple[Tensor, Tensor]:
        """Return keys and values with `new` slots more, which the caller writes."""
        start, stop = self.length, self.length + new
        if stop > self.buffers[0].shape[-2]:
            old = [b.narrow(-2, 0, start) for b in self.buffers]
            self.buffers = [self._empty(t, stop) for t in self.buffers]
            for buffer, kept in zip(self.buffers, old, strict=True):
                buffer.narrow(-2, 0, start).copy_(kept)
        self.length = stop
        return self.keys, self.values

    @property
    def keys(self) -> Tensor:
        """Return the stored keys [batch, heads, length, head_dim], a view."""
        return self.buffers[0].narrow(-2, 0, self.length)

    @keys.setter
    def keys(self, value: Any) -> None:
        """Ignore the framework's None at the start."""

    @property
    def values(self) -> Tensor:
        """Return the stored values [batch, heads, length, head_dim], a view."""
        return self.buffers[1].narrow(-2, 0, self.length)

    @values.setter
    def values(self, value: Any) -> None:
        """Ignore the framework's None at the start."""

    @staticmethod
    def _empty(like: Tensor, slots: int) -> Tensor:
        room = -(-slots // CHUNK) * CHUNK
        return like.new_empty((*like.shape[:-2], room, like.shape[-1]))

    def get_seq_length(self) -> int:
        """Return the number of stored tokens."""
        return self.length

    def crop_to(self, length: int) -> None:
        """Forget every slot from `length` on."""
        self.length = min(self.length, length)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, as the framework's layers do."""
        self.crop_to(self.length - abs(tokens_to_remove))

    def pick(self, start: int, path: Tensor) -> None:
        """Put the slots `start + path` behind the first `start` ones, and forget the rest. path: int64 [batch, n]."""
        for buffer in self.buffers:
            if len(path) == 1:  # 7 us instead of 9, and without an index of the buffer's size
                moved = buffer.index_select(-2, path[0] + start)
            else:
                wide = path[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[-1])
                moved = buffer.gather(-2, wide + start)
            buffer.narrow(-2, start, path.shape[1]).copy_(moved)
        self.length = start + path.shape[1]

    def gather(self, index: Tensor) -> None:
        """Reorder slots per row. index: int64 [batch, slots]."""
        for buffer, kept in zip(self.buffers, (self.keys, self.values), strict=True):
            wide = index[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[-1])
            buffer.narrow(-2, 0, index.shape[1]).copy_(kept.gather(-2, wide))
        self.length = index.shape[1]


class WindowCache(DynamicCache):
    """The layers of a `DynamicCache` as seen from the first block of the window that runs: sizes come from that
    layer.
    """

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)
        self.first = 0
        self.only_store = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of layer `layer_idx`; layer 0 stands for the first block of the window."""
        return self.layers[layer_idx or self.first].get_seq_length()  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (key length, offset 0) for `query_length` new tokens in the window."""
        return self.layers[self.first].get_seq_length() + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the length of the window's first layer."""
        return self.layers[self.first].get_seq_length()  # type: ignore[no-any-return]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store new keys and values; stop the block there while `only_store` is set."""
        out = self.layers[layer_idx].update(key_states, value_states)
        if self.only_store:
            raise Stored
        return out

    @contextmanager
    def seen_from(self, first: int) -> Iterator[None]:
        """Let sizes come from layer `first` inside the context."""
        self.first = first
        try:
            yield
        finally:
            self.first = 0

    def crop_to(self, length: int) -> None:
        """Crop every layer to at most `length` slots, whatever each holds."""
        for layer in self.layers:
            layer.crop_to(length)

    def shortest(self) -> int:
        """Return the number of tokens that every layer holds."""
        lengths: list[int] = [layer.length for layer in self.layers]
        return min(lengths)


def why_not(cache: Any, depth: int, longest: int) -> str | None:
    """Return why windows cannot run on this cache, or None. longest: tokens it may come to hold."""
    if type(cache) is not DynamicCache:
        return f"a {type(cache).__name__} (only DynamicCache can hold layers of different length)"
    # T5 with fewer decoder than encoder layers gets a cache for the encoder's number; the last layers stay empty
    if cache.layers and (len(cache.layers) < depth or any(layer.is_initialized for layer in cache.layers[depth:])):
        return f"a cache of {len(cache.layers)} layers for {depth} blocks"
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if longest > layer.sliding_window:
                return f"sliding attention whose window of {layer.sliding_window} tokens is passed ({longest} tokens)"
        elif type(layer) is not DynamicLayer:
            return f"cache layers of type {type(layer).__name__}"
    return None


@contextmanager
def borrowed(cache: DynamicCache, depth: int, wanted: bool = True) -> Iterator[WindowCache]:
    """Yield a `WindowCache` holding what `cache` holds; afterwards `cache` holds what the window came to hold.

    Rejected and half-run tokens are cropped: every layer ends with the tokens that all layers hold. After an error, and
    with `wanted` False, `cache` is left as it was: the same call can be made again.
    """
    plain = cache.layers
    layers = []
    for old in (plain or [None] * depth)[:depth]:
        new = GrowingLayer(bool(getattr(old, "is_sliding", False)))
        if old is not None and old.is_initialized and old.get_seq_length():
            new.update(old.keys, old.values)
        layers.append(new)
    window = WindowCache(layers)
    yield window
    if wanted:
        _give_back(cache, window)


def _give_back(cache: DynamicCache, window: WindowCache) -> None:
    """Copy what every layer of `window` holds into plain layers of `cache`."""
    length = window.shortest()
    make = cache.layer_class_to_replicate or DynamicLayer
    done = list(cache.layers) or [make() for _ in window.layers]
    for old, new in zip(done[: len(window.layers)], window.layers, strict=True):
        new.crop_to(length)
        if new.is_initialized:
            old.reset()
            # a clone made here is an ordinary tensor again, also when the loop ran in inference mode
            old.update(new.keys.clone(), new.values.clone())
    cache.layers = done


def causal(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the additive mask [1, 1, queries, keys] of `queries` tokens at the end of `keys` slots."""
    mask = torch.zeros((queries, keys), dtype=dtype, device=device)
    mask[:, keys - queries :].masked_fill_(
        torch.ones(queries, queries, dtype=torch.bool, device=device).triu(1), float("-inf")
    )
    return mask[None, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [batch, 1, new, slots] of what each new token sees, bool [batch, new, slots]."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
