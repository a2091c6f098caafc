"""The contract of a training loss, as a function to call from a test: `check_loss(MyLoss())`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.loss import WEIGHTINGS, Loss, Moment
from offramp.testing import require


def check_loss(loss: Loss, exits: int = 3, classes: int = 7, rows: int = 10) -> None:
    """Raise `ContractError` unless `loss` keeps every rule of `Loss`.

    Frozen; one finite scalar per exit; deterministic; blind to the order of rows; each exit's loss reaches that exit's
    prediction only, never the full model; a known weighting; gradient steps on it bring it down and make exits right;
    and where it trains a gate beside the exits too, that some step moves the gate, and some the exits.
    """
    settings = getattr(loss, "__dataclass_params__", None)
    require(settings is not None and settings.frozen, loss, "must be a frozen dataclass")
    require(loss.weighting in WEIGHTINGS, loss, f"weighting {loss.weighting!r} is not one of {sorted(WEIGHTINGS)}")
    make = torch.Generator().manual_seed(0)
    shape = (rows,) if loss.gate else (rows, classes)
    predictions = [torch.randn(shape, generator=make, requires_grad=True) for _ in range(exits)]
    final = torch.randn(rows, classes, generator=make, requires_grad=True)
    if loss.gate:  # for each exit, whether it is right
        targets = torch.randint(2, (rows, exits), generator=make)
    else:
        targets = torch.randint(classes, (rows,), generator=make)
    parts = loss.each(predictions, final, targets)
    right = len(parts) == exits and all(p.dim() == 0 and bool(p.isfinite()) for p in parts)
    require(right, loss, f"each must return {exits} finite scalars, one per exit")
    again = loss.each(predictions, final, targets)
    require(all(torch.equal(a, b) for a, b in zip(parts, again, strict=True)), loss, "two calls differ")
    order = torch.arange(rows).roll(1)  # every row moves
    mixed = loss.each([p[order] for p in predictions], final[order], targets[order])
    close = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(parts, mixed, strict=True))
    require(close, loss, "the order of the rows changes it")
    _check_gradients(loss, parts, predictions, final)
    odds = torch.randn(rows, exits, generator=make, requires_grad=True) if loss.beside else None
    moment = Moment(depths=tuple(range(1, exits + 2)), odds=odds)
    _check_descent(loss, predictions, final.detach(), targets, moment)
    if odds is not None:
        _check_both(loss, predictions, final.detach(), targets, moment)


def _check_gradients(loss: Loss, parts: Sequence[Tensor], predictions: Sequence[Tensor], final: Tensor) -> None:
    for i, part in enumerate(parts):
        require(part.requires_grad, loss, f"the loss of exit {i} has no gradient")
        found = torch.autograd.grad(part, [*predictions, final], retain_graph=True, allow_unused=True)
        require(found[-1] is None, loss, "gradient reaches the full model's prediction; detach it")
        for j, gradient in enumerate(found[:-1]):
            reached = gradient is not None and bool((gradient != 0).any())
            require(reached == (i == j), loss, f"the loss of exit {i} must reach exit {i} alone (exit {j}: {reached})")


def _check_both(
    loss: Loss, predictions: Sequence[Tensor], final: Tensor, targets: Tensor, moment: Moment, steps: int = 40
) -> None:
    moved = set()
    for step in range(steps):
        value = loss(predictions, final, targets, moment=dataclasses.replace(moment, step=step, steps=steps))
        found = torch.autograd.grad(value, [*predictions, moment.odds], allow_unused=True)  # type: ignore[arg-type]
        moved |= {i for i, g in enumerate(found) if g is not None and bool((g != 0).any())}
    require(len(predictions) in moved, loss, f"no step of {steps} moves the gate {loss.beside!r}")
    require(len(moved) == len(predictions) + 1, loss, f"of exits and gate only {sorted(moved)} are ever moved")


def _check_descent(
    loss: Loss, predictions: Sequence[Tensor], final: Tensor, targets: Tensor, moment: Moment
) -> None:
    free = [p.detach().clone().requires_grad_() for p in predictions]
    step = torch.optim.Adam(free, lr=0.1)
    before, values = _agreement(free, final, targets), []
    for _ in range(50):
        step.zero_grad()
        value = loss(free, final, targets, moment=moment)
        require(value.dim() == 0, loss, "calling it must return one scalar")
        torch.autograd.backward(value)
        step.step()
        values.append(float(value.detach()))
    require(values[-1] < values[0], loss, f"50 steps did not bring it down ({values[0]:.4g} -> {values[-1]:.4g})")
    after = _agreement(free, final, targets)
    better = after[0] > before[0] or after[1] > before[1]
    require(better, loss, "bringing it down makes exits agree neither with the full model nor with the labels")


def _agreement(predictions: Sequence[Tensor], final: Tensor, targets: Tensor) -> tuple[float, float]:
    if targets.dim() > 1:
        said = float((torch.stack([p.detach() > 0 for p in predictions], 1) == targets).double().mean())
        return said, said
    answers = torch.stack([p.detach().argmax(-1) for p in predictions])
    return float((answers == final.argmax(-1)).double().mean()), float((answers == targets).double().mean())
