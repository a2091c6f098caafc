"""The one hook on a block: skip it, capture its state, inject another, or run only some rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp.call import BlockSpec as BlockSpec
from offramp.call import Call as Call
from offramp.call import Path
from offramp.call import state_of as state_of
from offramp.call import with_state as with_state
from offramp.errors import BadArgument, UnsupportedModel

Handler = Callable[[int, Call], Any]


#: where `module.compile()` puts what runs instead of the module's call
COMPILED = "_compiled_call_impl"


class BlockHook:
    """Replaces `module.forward` by a bound method, so that deep copies of the model get a consistent copy of it.

    On a module that was compiled in place it stands before what was compiled: inside it every decision would be a guard
    of a graph, and torch gives up compiling after eight of them.
    """

    def __init__(self, chain: Chain, module: nn.Module, positions: list[int], handler: Handler) -> None:
        self.chain, self.module, self.positions, self.handler = chain, module, positions, handler
        self.turn = 0
        self.put()

    def put(self) -> None:
        """Stand before whatever runs the block now."""
        self.place = "forward" if self.module.__dict__.get(COMPILED) is None else COMPILED
        self.previous = self.module.__dict__.get(self.place)
        self.original = getattr(self.module, self.place)
        self.module.__dict__[self.place] = self.forward

    def settle(self) -> None:
        """Stand there still where the block was compiled since, or is no more (a deep copy is not)."""
        compiled = self.module.__dict__.get(COMPILED)
        if isinstance(getattr(compiled, "__self__", None), BlockHook) or (compiled is None and self.place == "forward"):
            return
        if self.place == "forward":
            if self.module.__dict__.get("forward") != self.forward:  # something stands on top, and stays there
                return
            self.remove()
        self.put()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the call to the handler with the index of the block; a shared block counts its own turns."""
        index = self.positions[self.turn % len(self.positions)]
        self.turn += 1
        return self.handler(index, Call(self.original, args, kwargs, self.chain.spec))

    def remove(self) -> None:
        """Put back exactly what was there."""
        if self.previous is None:
            self.module.__dict__.pop(self.place, None)
        else:
            self.module.__dict__[self.place] = self.previous


@dataclass
class Unhook:
    """The undo of `Chain.install`; an object and no closure, so that a deep copy of a model undoes its own hooks."""

    chain: Chain
    mine: list[BlockHook]

    def __call__(self) -> None:
        """Remove the hooks, once."""
        while self.mine:
            hook = self.mine.pop()
            hook.remove()
            self.chain.hooks.remove(hook)


@dataclass
class Chain:
    """The blocks in order (a shared block once per time it runs) and how they are called."""

    blocks: Sequence[nn.Module]
    spec: BlockSpec
    hooks: list[BlockHook] = field(default_factory=list)
    #: of the state after each block, without the batch, where blocks change it; None where it stays as it comes in
    shapes: Sequence[tuple[int, ...]] | None = None

    def install(self, handler: Handler) -> Callable[[], None]:
        """Send every block call to `handler(index, call)`; returns the undo, to be called in reverse order of
        installs.
        """
        positions: dict[int, list[int]] = {}
        modules: dict[int, nn.Module] = {}
        for index, block in enumerate(self.blocks):
            positions.setdefault(id(block), []).append(index)
            modules[id(block)] = block
        mine = [BlockHook(self, module, positions[key], handler) for key, module in modules.items()]
        self.hooks.extend(mine)
        return Unhook(self, mine)

    def skip(self, index: int, call: Call, hidden: Tensor | None = None) -> Any:
        """Return what block `index` would, without running it: `hidden`, or the incoming state, or, where the block
        would change its shape, zeros that take no memory."""
        if hidden is None and self.shapes is not None and call.hidden.shape[1:] != self.shapes[index]:
            hidden = call.hidden.new_zeros(()).expand(call.hidden.shape[0], *self.shapes[index])
        return call.skip(hidden)

    def run(self, index: int, call: Call, hidden: Tensor | None = None) -> Any:
        """Run block `index`, on `hidden` where that is its incoming state: what runs between blocks that change the
        shape has made the incoming state of it already."""
        return call.run(hidden if index == 0 or self.shapes is None else None)

    def incoming(self, index: int, call: Call) -> Tensor:
        """Return the state that comes into block `index`."""
        return call.hidden

    def outgoing(self, index: int, output: Any) -> Tensor:
        """Return the state in what block `index` returned."""
        return state_of(output)

    def reset(self) -> None:
        """Start counting the turns of shared blocks anew; called before every forward."""
        for hook in self.hooks:
            hook.turn = 0
            hook.settle()

    @contextmanager
    def capture(self, depths: Sequence[int], calls: list[Call] | None = None) -> Iterator[dict[int, Tensor]]:
        """Keep the hidden state after each of `depths` blocks (0 = into the first) while the context lasts; `calls`
        takes how each block was called."""
        kept: dict[int, Tensor] = {}

        def handler(index: int, call: Call) -> Any:
            if calls is not None:
                calls.append(call)
            if index == 0 and 0 in depths:
                kept[0] = self.incoming(0, call)
            output = call.run()
            if index + 1 in depths:
                kept[index + 1] = self.outgoing(index, output)
            return output

        undo = self.install(handler)
        try:
            yield kept
        finally:
            undo()

    @contextmanager
    def window(self, start: int, stop: int, hidden: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """Run only blocks start < i <= stop while the context lasts, from `hidden`; the last state is kept as
        "hidden".
        """
        if not 0 <= start <= stop <= len(self.blocks):
            raise BadArgument(
                f"window({start}, {stop}) is outside the model: give 0 <= start <= stop <= {len(self.blocks)}"
            )
        kept: dict[str, Tensor] = {}

        def handler(index: int, call: Call) -> Any:
            if not start <= index < stop:
                # so that window(depth, depth, h) reads h out
                return self.skip(index, call, hidden if index + 1 == start else None)
            output = self.run(index, call, hidden if index == start else None)
            kept["hidden"] = self.outgoing(index, output)
            return output

        undo = self.install(handler)
        try:
            yield kept
        finally:
            undo()


def learn_spec(
    blocks: Sequence[nn.Module],
    probe: Callable[[int], Any],
    argument: str = "hidden_states",
    first: bool = False,
    alike: bool = True,
) -> tuple[BlockSpec, list[Call]]:
    """Find out how the blocks are called by running the model on batches of 2 and 3 rows.

    probe(batch) must run the model's forward. first: run only the first block, the others return their input, so that a
    probe costs next to nothing (blocks must then be alike). alike: whether blocks must keep the shape. Returns the spec
    and the calls of the 2-row run, one per block. Raises `UnsupportedModel` when the blocks are not run once each, in
    order, on a [batch, ...] hidden state.
    """
    seen: dict[int, list[tuple[Call, Any]]] = {2: [], 3: []}
    for batch, calls in seen.items():
        order: list[int] = []

        def handler(index: int, call: Call, calls: list[Any] = calls, order: list[int] = order) -> Any:
            order.append(index)
            output = with_state(calls[0][1], call.hidden) if first and calls else call.run()
            calls.append((call, output))
            return output

        undo = Chain(blocks, BlockSpec(argument)).install(handler)
        try:
            with torch.no_grad():
                probe(batch)
        finally:
            undo()
        if order != list(range(len(blocks))):
            raise UnsupportedModel(f"its {len(blocks)} blocks are not run once each in order (ran: {order[:20]})")
    batched: set[Path] = set()
    for (two, out), (three, _) in zip(seen[2], seen[3], strict=True):
        sizes = dict(_leaves(three))
        batched |= {p for p, n in _leaves(two) if n == 2 and sizes.get(p) == 3}
        try:
            rows = two.hidden.shape[0]
        except (KeyError, AttributeError):
            raise UnsupportedModel(f"its blocks take no {argument!r} tensor first") from None
        state = state_of(out)
        kept = isinstance(state, Tensor) and (state.shape == two.hidden.shape if alike else state.shape[:1] == (2,))
        if rows != 2 or not kept:
            raise UnsupportedModel("its blocks do not map a [batch, ...] hidden state to one of the same shape")
    output = seen[2][0][1]
    size = len(output) if isinstance(output, tuple) else None
    spec = BlockSpec(argument, 0, size, frozenset(batched - {(0,), (argument,)}))
    return spec, [call for call, _ in seen[2]]


def _leaves(call: Call) -> Iterator[tuple[Path, int]]:
    def walk(value: Any, path: Path) -> Iterator[tuple[Path, int]]:
        if isinstance(value, Tensor) and value.dim():
            yield path, value.shape[0]
        elif isinstance(value, (tuple, list)):
            for i, v in enumerate(value):
                yield from walk(v, (*path, i))

    for i, a in enumerate(call.args):
        yield from walk(a, (i,))
    for k, v in call.kwargs.items():
        yield from walk(v, (k,))
