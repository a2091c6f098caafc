"""What leaving at each exit costs one row: counted in blocks, in floating-point operations, or in measured seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from offramp.attach import MODULE, Exits
from offramp.blocks import Call
from offramp.errors import UnknownName, did_you_mean

UNITS = ("blocks", "flops", "seconds")
#: runs that a time is the median of, after one that is not counted
REPEATS = 5


class Meter:
    """Reads what was spent since it was entered: seconds, after the device is done, or floating-point operations."""

    def __init__(self, unit: str) -> None:
        self.unit = unit

    def __enter__(self) -> Meter:
        if self.unit == "flops":
            from torch.utils.flop_counter import FlopCounterMode

            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()
        self.began = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.unit == "flops":
            self.counter.__exit__(kind, error, trace)

    def _now(self) -> float:
        if self.unit == "flops":
            return float(self.counter.get_total_flops())
        from offramp.clock import sync  # loaded by those who measure alone: 8 ms of an import

        sync()
        return time.perf_counter()

    def read(self) -> float:
        """Return what was spent so far."""
        return self._now() - self.began


def check_unit(unit: str) -> None:
    """Raise `UnknownName` unless costs can be measured in this unit."""
    if unit not in UNITS:
        raise UnknownName(f"costs={unit!r} is no unit of cost;{did_you_mean(unit, UNITS)}")


def spent(run: Callable[[Meter], list[float]], unit: str) -> list[float]:
    """Return what `run(meter)` read: once for operations, the median of several times for seconds, element by element.
    """
    found = []
    for _ in range(1 if unit == "flops" else REPEATS + 1):
        with Meter(unit) as meter:
            found.append(run(meter))
    return torch.tensor(found[-REPEATS:], dtype=torch.float64).median(0).values.tolist()


@torch.no_grad()
def measure(exits: Exits, batch: Any, unit: str) -> Tensor:
    """Return the cumulative cost [K] per row of leaving at each exit, and last of the full model, on one batch.

    All heads on the way are included. unit: blocks, flops (`torch.utils.flop_counter`: matrix products, convolutions
    and attention) or seconds. Raises `UnknownName`.
    """
    check_unit(unit)
    depth = exits.backbone.depth
    if unit == "blocks":
        return torch.tensor([float(d) for d in (*exits.at, depth)])
    seen = exits.observe(batch)
    inputs = exits.inputs(seen)

    def forward(meter: Meter) -> list[float]:
        reached = [0.0] * depth

        def block(index: int, call: Call) -> Any:
            output = call.run()
            reached[index] = meter.read()
            return output

        undo = exits.backbone.chain().install(block)
        try:
            exits.backbone.call(batch)
        finally:
            undo()
        return [*(reached[d - 1] for d in exits.at), meter.read()]

    def heads(meter: Meter) -> list[float]:
        found = []
        for d, hidden in zip(exits.at, inputs, strict=True):
            exits[d](hidden)
            found.append(meter.read())
        return [*found, found[-1]]

    total = torch.tensor([spent(forward, unit), spent(heads, unit)], dtype=torch.float64).sum(0)
    return total / len(seen.final)


def weights(exits: Exits) -> tuple[float, ...]:
    """Return how many bytes of weights a model cut at each exit keeps, and last the full one: `sizes` of "search".

    Counted are the model's weights without those of blocks that lie deeper, and the heads up to the exit.
    """
    blocks = list(exits.backbone.chain().blocks)
    own = {id(p): p for name, p in exits.model.named_parameters() if not name.startswith(f"{MODULE}.")}
    found = []
    for i, d in enumerate((*exits.at, exits.backbone.depth)):
        deeper = _weights(blocks[d:]).keys() - _weights(blocks[:d]).keys()
        kept = {k: p for k, p in own.items() if k not in deeper} | _weights([exits[a] for a in exits.at[: i + 1]])
        found.append(float(sum(p.numel() * p.element_size() for p in kept.values())))
    return tuple(found)


def _weights(modules: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Return every weight once, by its identity."""
    return {id(p): p for module in modules for p in module.parameters()}
