"""One call of a block, not made yet: run it, on another state or on some rows, or return what came in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Path = tuple[Any, ...]


@dataclass(frozen=True)
class BlockSpec:
    """Facts about how a block is called, as data.

    argument, place: keyword name and position of the hidden state; size: length of the returned tuple whose item 0 is
    the hidden state, or None when the block returns the tensor; batched: paths of the other arguments whose dimension
    0 is the batch, e.g. ("attention_mask",) or (1, 0).
    """

    argument: str = "hidden_states"
    place: int = 0
    size: int | None = None
    batched: frozenset[Path] = frozenset()


@dataclass
class Call:
    """One call of a block, not made yet."""

    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: BlockSpec

    @property
    def hidden(self) -> Tensor:
        """The incoming hidden state."""
        value = self.args[self.spec.place] if len(self.args) > self.spec.place else self.kwargs[self.spec.argument]
        return value  # type: ignore[no-any-return]

    def run(self, hidden: Tensor | None = None, rows: Tensor | None = None) -> Any:
        """Run the block, on `hidden` instead of the incoming state, and with `rows` of every batched argument."""
        args, kwargs = self.args, self.kwargs
        if rows is not None and self.spec.batched:
            args = tuple(_select(a, (i,), rows, self.spec.batched) for i, a in enumerate(args))
            kwargs = {k: _select(v, (k,), rows, self.spec.batched) for k, v in kwargs.items()}
        if hidden is not None:
            if len(args) > self.spec.place:
                args = (*args[: self.spec.place], hidden, *args[self.spec.place + 1 :])
            else:
                kwargs = {**kwargs, self.spec.argument: hidden}
        return self.original(*args, **kwargs)

    def through(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the state that another block of the same kind makes of `hidden`, called as this one was."""
        return state_of(Call(block.forward, self.args, self.kwargs, self.spec).run(hidden))

    def skip(self, hidden: Tensor | None = None) -> Any:
        """Return `hidden` (default: the incoming state) in the block's own return shape, without running it."""
        out = self.hidden if hidden is None else hidden
        return out if self.spec.size is None else (out, *[None] * (self.spec.size - 1))


def state_of(output: Any) -> Tensor:
    """Return the hidden state in a block's return value."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def with_state(output: Any, hidden: Tensor) -> Any:
    """Return a block's return value with its hidden state replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _select(value: Any, path: Path, rows: Tensor, batched: frozenset[Path]) -> Any:
    if isinstance(value, Tensor):  # dimension 0 of size 1 is broadcast to the batch: there is nothing to choose
        return value.index_select(0, rows) if path in batched and value.dim() and value.shape[0] > 1 else value
    if isinstance(value, (tuple, list)):
        parts = [_select(v, (*path, i), rows, batched) for i, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # named tuples take them apart
    return value
