"""Train what is attached to a denoiser, with the denoiser as it is: maps at exits, and estimates of their errors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from offramp._plugins import part
from offramp._registry import create
from offramp.attach import Exits, find
from offramp.enable import enable
from offramp.errors import BadArgument
from offramp.loss import Loss
from offramp.policy import FULL
from offramp.record import evaluating, track
from offramp_diffusers.tune import TuneReport, check_data, noised, objective_of, one_loss, predict


def tune_heads(
    model: Any,
    data: Mapping[str, Tensor],
    scheduler: Any,
    *,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> TuneReport:
    """Train only the attached heads, each in turn, to answer from its depth; the denoiser stays as it is.

    data, scheduler: as for `tune`. Raises `NotAttached`, `BadArgument`.
    """
    model = part(model)
    exits = find(model)
    weights = list(exits.modules.parameters())
    if not weights:
        raise BadArgument(f"heads {exits.head!r} have no weights; tune the model itself: offramp_diffusers.tune.tune")
    check_data(model, data, steps)
    objective = create(Loss, "ase")

    def value(depth: int, generator: torch.Generator) -> Tensor:
        return one_loss(model, data, scheduler, objective, (0.0, FULL), batch_size, generator)

    return _train(model, exits, weights, value, "train heads", steps, lr, seed, progress)


def tune_uncertainty(
    model: Any,
    data: Mapping[str, Tensor],
    scheduler: Any,
    *,
    loss: str | Loss = "uncertainty_layerwise",
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 64,
    backbone: bool = False,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> TuneReport:
    """Train attached heads "uncertainty" to estimate the error of their exit, each in turn; with `backbone` the model
    too, to be less wrong where it is trusted.

    data, scheduler: as for `tune`; options: the loss's. Raises `NotAttached`, `BadArgument`. Paper: DeeDiff
    (arXiv 2309.17074).
    """
    model = part(model)
    exits = find(model)
    if exits.head != "uncertainty":
        raise BadArgument(
            f"heads {exits.head!r} estimate no error; attach: offramp.attach(model, at=[...], head=\"uncertainty\")"
        )
    check_data(model, data, steps)
    objective = objective_of(loss, options, "estimated_at", "estimate", "uncertainty_layerwise")
    if not backbone:  # the second part is about the model, and must not teach the estimate to distrust everything
        objective = dataclasses.replace(objective, trusted=0.0)
    weights = [*exits.modules.parameters()] if not backbone else [*model.parameters()]

    def value(depth: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data["sample"]), (batch_size,), generator=generator)
        given, wanted, levels = noised(data, rows, scheduler, (0.0, FULL), generator, model)
        with exits.backbone.chain().capture([depth]) as kept:
            said = predict(model, given, wanted)
        head: Any = exits[depth]
        return objective.estimated_at(said, wanted, head.uncertainty(kept[depth], levels))  # type: ignore[no-any-return]

    return _train(model, exits, weights, value, "tune", steps, lr, seed, progress)


def _train(
    model: Any,
    exits: Exits,
    weights: list[torch.nn.Parameter],
    value: Callable[[int, torch.Generator], Tensor],
    what: str,
    steps: int,
    lr: float,
    seed: int,
    progress: bool,
) -> TuneReport:
    """Lower `value(depth, generator)` of each exit in turn by training `weights`; all others stay as they are."""
    report = TuneReport(parameters=sum(p.numel() for p in weights))
    optimiser, generator = torch.optim.AdamW(weights, lr=lr), torch.Generator().manual_seed(seed)
    grads, started = {p: p.requires_grad for p in model.parameters()}, time.perf_counter()
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with evaluating(model):
            for step in track(range(steps), what, progress, steps):
                depth = exits.at[step % len(exits.at)]
                with enable(model, "fixed", depth=depth):
                    loss = value(depth, generator)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                optimiser.step()
                report.losses.append(float(loss.detach()))
    finally:
        for p, flag in grads.items():
            p.requires_grad_(flag)
    report.seconds = time.perf_counter() - started
    return report
