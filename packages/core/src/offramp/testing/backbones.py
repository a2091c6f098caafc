"""The contract of a backbone, as one call: `check_backbone(backbone, batch)` raises `ContractError`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone
from offramp.blocks import Call, state_of
from offramp.testing import ContractError


def check_backbone(backbone: Backbone, batch: Any) -> None:
    """Check what every backbone promises, on one batch as `backbone.call` takes it; the model must be in eval mode.

    Taps are 1 .. depth; two windows make the whole; `observe` sees what a plain call computes and changes nothing;
    hooks come off exactly, also after an exception; a deep copy is independent. Raises `ContractError`.
    """
    with torch.no_grad():
        full = list(tensors(backbone.call(batch)))
        if not full:
            raise ContractError(f"{_who(backbone)}: call() returned no tensor")
        _taps(backbone)
        _windows(backbone, batch, full)
        _observe(backbone, batch, full)
        _hooks(backbone, batch, full)
        _copy(backbone, batch, full)


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of a model's output, whatever it is packed in."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors(value)


def _who(backbone: Backbone) -> str:
    return f"{type(backbone).__name__} of {type(backbone.model).__name__}"


def _equal(one: list[Tensor], two: list[Tensor], exact: bool = True) -> bool:
    same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    return len(one) == len(two) and all(a.shape == b.shape and same(a, b) for a, b in zip(one, two, strict=True))


def _taps(backbone: Backbone) -> None:
    taps, width = backbone.taps(), backbone.context().width
    depths = [t.depth for t in taps]
    if depths != list(range(1, backbone.depth + 1)):
        raise ContractError(f"{_who(backbone)}: taps are at {depths}, not at 1 to {backbone.depth}")
    wrong = [t for t in taps if not t.name or t.width < 1 or not t.layout.startswith("batch")]
    if wrong or (taps[-1].width != width and not backbone.tail):
        raise ContractError(f"{_who(backbone)}: taps without name, width or batch: {wrong}; the readout takes {width}")
    blocks = len(backbone.chain().blocks)
    if blocks != backbone.depth:
        raise ContractError(f"{_who(backbone)}: depth is {backbone.depth}, but its chain has {blocks} blocks")


def _windows(backbone: Backbone, batch: Any, full: list[Tensor]) -> None:
    for cut in sorted({1, backbone.depth // 2, backbone.depth - 1} - {0}):
        with backbone.window(0, cut) as kept:
            backbone.call(batch)
        with backbone.window(cut, backbone.depth, kept["hidden"]):
            out = list(tensors(backbone.call(batch)))
        if not _equal(out[:1], full[:1], exact=False):
            raise ContractError(f"{_who(backbone)}: windows 0 to {cut} and {cut} to {backbone.depth} are not the model")


def _observe(backbone: Backbone, batch: Any, full: list[Tensor]) -> None:
    depths = sorted({1, max(1, backbone.depth - 1)})
    seen = backbone.observe(batch, depths)
    width = backbone.context().width
    states = [*seen.hidden, seen.final]
    rows = {len(h) for h in states}
    widths = [*(backbone.taps()[d - 1].width for d in depths), width]
    sizes = [tuple(h.shape[1:]) for h in states]
    if len(rows) != 1 or sizes != [(w,) for w in widths]:
        raise ContractError(f"{_who(backbone)}: observe() must give one [rows, width] per depth, and last: {widths}")
    for what in ("targets", "position", "sample"):
        value = getattr(seen, what)
        if value is not None and len(value) not in rows:
            raise ContractError(f"{_who(backbone)}: observe() gives {len(value)} {what} for {rows} rows")
    if not _equal(list(tensors(backbone.call(batch))), full):
        raise ContractError(f"{_who(backbone)}: observe() changed what the model says")
    with backbone.chain().capture([*depths, backbone.depth]) as kept:
        backbone.call(batch)
    last = [] if backbone.tail else [backbone.depth]
    for depth, state in zip([*depths, *last], states, strict=False):
        pooled = backbone.pool(kept[depth])
        if not _rows_among(state, pooled.reshape(-1, state.shape[-1])):
            raise ContractError(f"{_who(backbone)}: observe() at depth {depth} is not the state of a plain call")
    logits, said = full[0].reshape(-1, full[0].shape[-1]), backbone.context().readout(seen.final)
    if logits.shape == said.shape and not torch.allclose(logits, said, rtol=1e-4, atol=1e-5):
        raise ContractError(f"{_who(backbone)}: context().readout(observe().final) is not what the model says")


def _rows_among(rows: Tensor, pool: Tensor) -> bool:
    if rows.shape == pool.shape:
        return torch.allclose(rows, pool, rtol=1e-4, atol=1e-5)
    near = torch.cdist(rows.float(), pool.float(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return bool((near < 1e-3 * (1 + rows.float().norm(dim=1))).all())


def _marks(model: nn.Module) -> dict[str, Any]:
    """Return everything a hook could leave behind: instance attributes and hook tables of every module."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else id(value)
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
    }


def _hooks(backbone: Backbone, batch: Any, full: list[Tensor]) -> None:
    order: list[int] = []

    def watch(index: int, call: Call) -> Any:
        order.append(index)
        output = call.run()
        if not isinstance(state_of(output), Tensor):
            raise ContractError(f"{_who(backbone)}: block {index} returns no hidden state where its spec says")
        return output

    def fail(index: int, call: Call) -> Any:
        raise KeyboardInterrupt

    before = _marks(backbone.model)
    undo = backbone.chain().install(watch)
    try:
        if not _equal(list(tensors(backbone.call(batch))), full):
            raise ContractError(f"{_who(backbone)}: a hook that only looks on changes what the model says")
    finally:
        undo()
    if order != list(range(backbone.depth)):
        raise ContractError(f"{_who(backbone)}: its blocks ran in the order {order}, not once each from 0")
    undo = backbone.chain().install(fail)
    try:
        backbone.call(batch)
    except KeyboardInterrupt:
        pass
    finally:
        undo()
    if _marks(backbone.model) != before or not _equal(list(tensors(backbone.call(batch))), full):
        raise ContractError(f"{_who(backbone)}: taking the hooks off does not give the model back as it was")


def _copy(backbone: Backbone, batch: Any, full: list[Tensor]) -> None:
    other = copy.deepcopy(backbone)
    if other.model is backbone.model or not _equal(list(tensors(other.call(batch))), full):
        raise ContractError(f"{_who(backbone)}: a deep copy does not say the same with weights of its own")
    last = other.chain().blocks[-1]
    for p in last.parameters():
        p.zero_()
    if not _equal(list(tensors(backbone.call(batch))), full):
        raise ContractError(f"{_who(backbone)}: changing a deep copy changes the original")
    if _equal(list(tensors(other.call(batch))), full):
        raise ContractError(f"{_who(backbone)}: a deep copy's chain does not hold the blocks that the copy runs")
