"""Run windows of a decoder straight through its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from offramp.blocks import state_of
from offramp_hf.backbones import _quick
from offramp_hf.backbones._calls import Given, recordable
from offramp_hf.backbones.decoder import Decoder
from offramp_hf.cache import GrowingLayer, Stored, WindowCache, additive, causal
from offramp_hf.decode.place import Place

#: positions whose rotary tables are asked from the model at once
TABLE = 256
#: masks of up to so many new tokens are kept
FEW = 16


class Unfit(Exception):  # noqa: N818  (a signal, not an error)
    """The blocks of this model need more than `Direct` can supply; says what."""


class Direct:
    """Calls the blocks themselves, for one unpadded row: the model's forward is asked only for its rotary tables.

    Saves what the model does around its blocks at every step (masks, positions, wrappers): about 8 % of a token on a
    5 M-parameter model. Only built where a probe shows that block inputs are the embeddings and that every argument
    is a constant, a cache, a table over positions or a causal mask.
    """

    #: whether rejected slots stay in the cache and are masked, instead of being moved out of the way
    holes = False

    def __init__(self, decoder: Decoder, cache: WindowCache, size: int = TABLE) -> None:
        self.decoder, self.cache, self.size = decoder, cache, size
        self.embed = decoder.model.get_input_embeddings()
        self.start = -1
        self.masks: dict[int, Tensor] = {}
        #: query heads per key head, inside `running`
        self.groups = 1
        self.views: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.prepare(0)

    @property
    def learned(self) -> int:
        """Return in how many calls recordings were made or compared."""
        return self.decoder.replay.learned

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything happens inside this context: blocks make no lasting tensors, and without view tracking and
        version counters a token is about 10 % faster."""
        model = self.decoder.model
        groups = _quick.head_groups(model, self.decoder.blocks)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(_quick.quick_norms(model.modules()))
            if groups > 1:
                stack.enter_context(_quick.grouped(model))
            self.groups, self.masks = groups, {}
            self.decoder.replay.begin(self.decoder.compiled)
            try:
                yield
            finally:
                self.groups, self.masks = 1, {}

    def prepare(self, start: int) -> None:
        """Ask the model how it calls its blocks at the `size` positions from `start` on."""
        self.start = start
        self.views.clear()
        ids = self.decoder._ids(1, self.size)
        where = torch.arange(self.start, self.start + self.size, device=ids.device)[None]
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
            if value.dim() >= 2 and value.shape[1] == self.size:
                return "table"
            if value.dim() == 1 and len(value) == self.size:
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
        if place.tree is not None:
            return self.run(start, stop, state, self.around(state, slots, place, self.cache))
        if not self.start <= slots <= slots + new <= self.start + self.size:
            return self._cross(tokens, start, stop, state, place)
        mask = self.mask(new, slots, state)
        groups = self.arguments(slots, new)
        if mask is not None:
            groups = [
                {k: mask if kind[k] == "mask" else v for k, v in g.items()}
                for g, kind in zip(groups, self.kinds, strict=True)
            ]
        return self.run(start, stop, state, groups, frozen)

    def run(self, start: int, stop: int, state: Tensor, groups: list[dict[str, Any]], frozen: Any = None) -> Tensor:
        """Run blocks start < i <= stop with these arguments; frozen: as in `Through.window`."""
        replay, new, layers = self.decoder.replay, state.shape[1], self.cache.layers
        given = [Given.of(g, kinds) for g, kinds in zip(groups, self.kinds, strict=True)]
        if self.cache.only_store:
            for index in range(start, stop):
                one = given[self.shared[index]]
                step = replay.writing(index, (state.shape, one.key))
                if step is None:
                    self.decoder.blocks[index](state, **one.arguments)  # raises `Stored`
                else:
                    step[0](state, *layers[index].room(new), *one.tensors, *step[1])
            return state
        ready = [replay.ready((state.shape, g.key)) for g in given]
        for index in range(start, stop):
            kind = self.shared[index]
            step = ready[kind][index] or replay.find(index, (state.shape, given[kind].key))
            if step is None:
                state = self.watched(index, state, given[kind])
            else:
                state = step[0](state, *layers[index].room(new), *given[kind].tensors, *step[1])
            if frozen is not None:
                state = torch.where(frozen[0][:, None, None], frozen[1], state)
        return state

    def watched(self, index: int, state: Tensor, given: Given) -> Tensor:
        """Run block `index` itself, and let the recordings learn from it."""
        block, layer = self.decoder.blocks[index], self.cache.layers[index]
        out = state_of(block(state, **given.arguments))
        if recordable(state, layer):
            shape = state.shape, given.key
            self.decoder.replay.learn(index, shape, out, lambda: given.example(block, index, state, layer))
        return out

    def other(self, block: nn.Module, hidden: Tensor, layer: GrowingLayer, place: Place, base: int) -> Tensor:
        """Run a copy of the last block; as `Through.other`, for one row."""
        slots, new = base + layer.length, hidden.shape[1]
        if place.tree is not None:
            own = WindowCache([layer] * self.decoder.depth)
            return state_of(block(hidden, **self.around(hidden, layer.length, place, own, base)[self.shared[-1]]))
        if slots // TABLE != (slots + new - 1) // TABLE:
            cut = (slots // TABLE + 1) * TABLE - slots
            parts = (hidden[:, :cut], hidden[:, cut:])
            return torch.cat([self.other(block, part, layer, place, base) for part in parts], 1)
        if not self.start <= slots < self.start + TABLE:
            self.prepare(slots // TABLE * TABLE)
        last = self.shared[-1]
        kinds, given = self.kinds[last], self.arguments(slots, new)[last]
        own = WindowCache([layer] * self.decoder.depth)
        mask = self.mask(new, layer.length, hidden)
        swap = {"cache": own, "mask": mask}
        return state_of(block(hidden, **{k: swap[kinds[k]] if kinds[k] in swap else v for k, v in given.items()}))

    def around(
        self, hidden: Tensor, slots: int, place: Place, cache: WindowCache, base: int = 0
    ) -> list[dict[str, Any]]:
        """Return the keyword arguments of nodes of a tree of drafts, one dict per kind of block; slots: of `cache`."""
        new = hidden.shape[1]
        where = self.reach(place.positions(base + slots, new, hidden.device), base + slots + new)
        seen = place.matrix(base + slots, new, hidden.device)
        mask = additive(seen[..., base:], hidden.dtype).repeat(1, 1, self.groups, 1)
        given = {"cache": cache, "mask": mask}
        return [
            {k: given[kind[k]] if kind[k] in given else _at(kind[k], v, where - self.start) for k, v in table.items()}
            for table, kind in zip(self.tables, self.kinds, strict=True)
        ]

    def reach(self, positions: Tensor, slots: int) -> Tensor:
        """Make sure that the tables hold these positions [1, new], all below `slots`; returns them."""
        low, high = int(positions.min()), int(positions.max())
        if not self.start <= low <= high < self.start + self.size:
            self.prepare(low)
        return positions

    def _cross(self, tokens: Tensor, start: int, stop: int, state: Tensor, place: Place) -> Tensor:
        """Run tokens that lie on both sides of a table's end, or outside it, piece by piece."""
        slots, new = self.cache.layers[start].length, tokens.shape[1]
        if slots // TABLE == (slots + new - 1) // TABLE:
            self.prepare(slots // TABLE * TABLE)
            return self.window(tokens, start, stop, state, place)
        cut = (slots // TABLE + 1) * TABLE - slots
        parts = [self.window(tokens[:, s], start, stop, state[:, s], place) for s in (slice(0, cut), slice(cut, new))]
        return torch.cat(parts, 1)

    def fill(self, tokens: Tensor, start: int, hidden: Tensor, place: Place) -> None:
        """Store keys and values of `hidden` in every block from `start` on; as `Through.fill`."""
        self.cache.only_store = True
        try:
            for index in range(start, self.decoder.depth):
                with suppress(Stored):
                    self.window(tokens, index, index + 1, hidden, place)
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


def _at(kind: str, value: Any, index: Tensor) -> Any:
    """Return the entries of a table over positions at `index` [batch or 1, new]; constants as they are."""
    if kind == "tables":
        return tuple(v[0][index] for v in value)
    if kind == "table":
        return value[0][index]
    return value[index[0]] if kind == "vector" else value
