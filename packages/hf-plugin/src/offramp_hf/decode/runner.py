"""Run windows of a decoder on new tokens: through the model's own forward, or straight through the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from offramp.blocks import Call, state_of
from offramp_hf import _compat
from offramp_hf.backbones.decoder import Decoder
from offramp_hf.cache import GrowingLayer, Stored, WindowCache, causal

#: positions whose rotary tables are asked from the model at once
TABLE = 256
#: masks of up to so many new tokens are kept
FEW = 16


class Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Raised at the end of a window: nothing behind it is wanted."""


class Place:
    """Where new tokens go. mask: [batch, slots] of 0/1 over all slots so far, or None without padding; longest: most
    tokens a row may come to hold (0: unknown).
    """

    def __init__(self, mask: Tensor | None, longest: int = 0, before: int | Tensor = 0) -> None:
        self.mask, self.longest, self.before = mask, longest, before

    def shifted(self, mask: Tensor | None, base: int) -> Place:
        """Return the same place for a cache that lacks the first `base` slots. mask: without them."""
        before = base if self.mask is None else self.mask[:, :base].sum(-1, keepdim=True)
        return Place(mask, self.longest, before)

    def positions(self, slots: int, new: int, device: torch.device) -> Tensor:
        """Return the positions [batch or 1, new] of `new` tokens behind `slots` stored ones: how many of the row's own
        tokens come before."""
        offset = torch.arange(new, device=device)[None]
        if self.mask is None:
            return offset + slots + self.before
        # drafts of a row that is nearly full, and rows that ended, would run past a learned position table; nobody
        # reads them
        return (self.mask[:, :slots].sum(-1, keepdim=True) + self.before + offset).clamp(max=max(self.longest, 1) - 1)


class Through:
    """Runs a window by calling the model: embeddings, masks and positions are the model's own, for every
    architecture.
    """

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
        if place.mask is not None:
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


class Unfit(Exception):  # noqa: N818  (a signal, not an error)
    """The blocks of this model need more than `Direct` can supply; says what."""


class Direct:
    """Calls the blocks themselves, for one unpadded row: the model's forward is asked only for its rotary tables.

    Saves what the model does around its blocks at every step (masks, positions, wrappers): about 8 % of a token on a
    5 M-parameter model. Only built where a probe shows that block inputs are the embeddings and that every argument
    is a constant, a cache, a table over positions or a causal mask.
    """

    def __init__(self, decoder: Decoder, cache: WindowCache) -> None:
        self.decoder, self.cache = decoder, cache
        self.embed = decoder.model.get_input_embeddings()
        self.start = -1
        self.masks: dict[int, Tensor] = {}
        #: query heads per key head, inside `running`
        self.groups = 1
        self.views: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.prepare(0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything happens inside this context: blocks make no lasting tensors, and without view tracking and
        version counters a token is about 10 % faster."""
        groups = _compat.head_groups(self.decoder.model, self.decoder.blocks)
        with torch.inference_mode(), _compat.grouped(self.decoder.model) if groups > 1 else nullcontext():
            self.groups, self.masks = groups, {}
            try:
                yield
            finally:
                self.groups, self.masks = 1, {}

    def prepare(self, position: int) -> None:
        """Ask the model how it calls its blocks at the TABLE positions around `position`."""
        self.start = position // TABLE * TABLE
        self.views.clear()
        ids = self.decoder._ids(1, TABLE)
        where = torch.arange(self.start, self.start + TABLE, device=ids.device)[None]
        probe = WindowCache([GrowingLayer(layer.is_sliding) for layer in self.cache.layers])
        inputs = {"position_ids": where} if self.decoder.takes("position_ids") else {}
        with torch.inference_mode(False), torch.no_grad():
            calls = self.decoder.calls(ids, past_key_values=probe, use_cache=True, **inputs)
        if not torch.equal(calls[0].hidden, self.embed(ids)):
            raise Unfit("its first block does not read the plain embeddings")
        names = [self.decoder.argument_names(call) for call in calls]
        tables: list[dict[str, Any]] = [
            {**dict(zip(n, c.args, strict=False)), **c.kwargs} for n, c in zip(names, calls, strict=True)
        ]
        self.shared: list[int] = []
        self.tables: list[dict[str, Any]] = []
        for table in tables:
            table.pop(self.decoder.chain().spec.argument, None)
            for i, other in enumerate(self.tables):
                if _same(table, other):
                    self.shared.append(i)
                    break
            else:
                self.shared.append(len(self.tables))
                self.tables.append(table)
        self.kinds = [{k: self._kind(k, v, probe) for k, v in t.items()} for t in self.tables]

    def _kind(self, name: str, value: Any, probe: WindowCache) -> str:
        if value is probe:
            return "cache"
        if name in ("attention_mask", "causal_mask"):
            return "mask"
        if value is None or isinstance(value, (bool, int, float, str)):
            return "constant"
        if isinstance(value, Tensor):
            if value.dim() >= 2 and value.shape[1] == TABLE:
                return "table"
            if value.dim() == 1 and len(value) == TABLE:
                return "vector"
        if isinstance(value, tuple) and all(self._kind(name, v, probe) == "table" for v in value):
            return "tables"
        raise Unfit(f"its blocks take {name}, which is no table over positions")

    def arguments(self, position: int, new: int) -> list[dict[str, Any]]:
        """Return the keyword arguments of `new` tokens from `position` on, one dict per kind of block."""
        key = (position, new)
        if key not in self.views:
            at = slice(position - self.start, position - self.start + new)
            self.views[key] = [
                {k: self._cut(kind[k], v, at) for k, v in table.items()}
                for table, kind in zip(self.tables, self.kinds, strict=True)
            ]
        return self.views[key]

    def _cut(self, kind: str, value: Any, at: slice) -> Any:
        if kind == "tables":
            return tuple(v[:, at] for v in value)
        if kind == "table":
            return value[:, at]
        if kind == "vector":
            return value[at]
        return self.cache if kind == "cache" else None if kind == "mask" else value

    def mask(self, new: int, slots: int, like: Tensor) -> Tensor | None:
        """Return the causal mask [1, 1, groups * new, slots + new], a view of one matrix; None for one token."""
        if new == 1:
            return None
        mask = self.masks.get(new)
        if mask is None or mask.shape[-1] < slots + new:
            mask = causal(new, slots + new + TABLE, like.dtype, like.device).repeat(1, 1, self.groups, 1)
            if new <= FEW:  # what drafts need again and again; a long catch-up comes once
                self.masks[new] = mask
        return mask[..., mask.shape[-1] - slots - new :]

    def window(
        self, tokens: Tensor, start: int, stop: int, hidden: Tensor | None, place: Place, frozen: Any = None
    ) -> Tensor:
        """Run blocks start < i <= stop; as `Through.window`, for one row."""
        state: Tensor = self.embed(tokens) if hidden is None else hidden
        slots, new = self.cache.layers[start].length, tokens.shape[1]
        if not self.start <= slots <= slots + new <= self.start + TABLE:
            return self._cross(tokens, start, stop, state, place)
        mask = self.mask(new, slots, state)
        groups = self.arguments(slots, new)
        if mask is not None:
            groups = [
                {k: mask if kind[k] == "mask" else v for k, v in g.items()}
                for g, kind in zip(groups, self.kinds, strict=True)
            ]
        for index in range(start, stop):
            state = state_of(self.decoder.blocks[index](state, **groups[self.shared[index]]))
        return state

    def other(self, block: nn.Module, hidden: Tensor, layer: GrowingLayer, place: Place, base: int) -> Tensor:
        """Run a copy of the last block; as `Through.other`, for one row."""
        slots, new = base + layer.length, hidden.shape[1]
        if slots // TABLE != (slots + new - 1) // TABLE:
            cut = (slots // TABLE + 1) * TABLE - slots
            parts = (hidden[:, :cut], hidden[:, cut:])
            return torch.cat([self.other(block, part, layer, place, base) for part in parts], 1)
        if not self.start <= slots < self.start + TABLE:
            self.prepare(slots)
        last = self.shared[-1]
        kinds, given = self.kinds[last], self.arguments(slots, new)[last]
        own = WindowCache([layer] * self.decoder.depth)
        mask = self.mask(new, layer.length, hidden)
        swap = {"cache": own, "mask": mask}
        return state_of(block(hidden, **{k: swap[kinds[k]] if kinds[k] in swap else v for k, v in given.items()}))

    def _cross(self, tokens: Tensor, start: int, stop: int, state: Tensor, place: Place) -> Tensor:
        """Run tokens that lie on both sides of a table's end, or outside it, piece by piece."""
        slots, new = self.cache.layers[start].length, tokens.shape[1]
        if slots // TABLE == (slots + new - 1) // TABLE:
            self.prepare(slots)
            return self.window(tokens, start, stop, state, place)
        cut = (slots // TABLE + 1) * TABLE - slots
        parts = [self.window(tokens[:, s], start, stop, state[:, s], place) for s in (slice(0, cut), slice(cut, new))]
        return torch.cat(parts, 1)

    def fill(self, tokens: Tensor, start: int, hidden: Tensor, place: Place) -> None:
        """Store keys and values of `hidden` in every block from `start` on; as `Through.fill`."""
        self.cache.only_store = True
        try:
            for index in range(start, self.decoder.depth):
                try:
                    self.window(tokens, index, index + 1, hidden, place)
                except Stored:
                    pass
        finally:
            self.cache.only_store = False


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def flat(value: Any) -> tuple[Any, ...]:
        return (
            tuple(id(v) for v in value)
            if isinstance(value, tuple)
            else (id(value) if isinstance(value, Tensor) else value,)
        )

    return a.keys() == b.keys() and all(flat(a[k]) == flat(b[k]) for k in a)
