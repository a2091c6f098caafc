"""Train what is attached to a denoiser, with the denoiser as it is: maps at exits, and estimates of their errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp._plugins import part
from offramp._registry import create
from offramp.attach import Exits, find
from offramp.enable import build_policy
from offramp.errors import BadArgument
from offramp.loss import Loss
from offramp.policy import FULL, ExitPolicy
from offramp_diffusers.noising import predict
from offramp_diffusers.training import How, Task, TuneReport, start, train, training
from offramp_diffusers.tune import check_data, objective_of


def tune_heads(
    model: Any,
    data: Mapping[str, Tensor],
    scheduler: Any,
    *,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 64,
    ema: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    folder: str | Path | None = None,
    every: int = 100,
    resume: bool = False,
) -> TuneReport:
    """Train only the attached heads, each in turn, to answer from its depth; the denoiser stays as it is.

    data, scheduler, folder, every, resume: as for `tune`. Raises `NotAttached`, `BadArgument`, `DamagedFile`.
    """
    model = part(model)
    exits = find(model)
    weights = list(exits.modules.parameters())
    if not weights:
        raise BadArgument(f"heads {exits.head!r} have no weights; tune the model itself: offramp_diffusers.tune.tune")
    check_data(model, data, scheduler)
    how = How(steps, lr, batch_size, ema, seed, progress, folder, every, resume)
    objective = create(Loss, "ase")

    def value(given: dict[str, Any], wanted: Tensor, levels: Tensor, policy: Any) -> Tensor:
        return objective.at(predict(model, given, wanted), wanted, levels)  # type: ignore[no-any-return]

    return _train(exits, data, scheduler, weights, value, "train heads", how, objective)


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
    ema: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    folder: str | Path | None = None,
    every: int = 100,
    resume: bool = False,
    **options: Any,
) -> TuneReport:
    """Train attached heads "uncertainty" to estimate the error of their exit, each in turn; output layers of their own,
    and with `backbone` the model too, to be less wrong where they are trusted.

    data, scheduler, folder, every, resume: as for `tune`; options: the loss's. Raises `NotAttached`, `BadArgument`,
    `DamagedFile`. Paper: DeeDiff (arXiv 2309.17074).
    """
    model = part(model)
    exits = find(model)
    if exits.head != "uncertainty":
        raise BadArgument(
            f"heads {exits.head!r} estimate no error; attach: offramp.attach(model, at=[...], head=\"uncertainty\")"
        )
    check_data(model, data, scheduler)
    how = How(steps, lr, batch_size, ema, seed, progress, folder, every, resume)
    objective = objective_of(loss, options, "estimated_at", "estimate", "uncertainty_layerwise")
    heads: list[Any] = [exits[depth] for depth in exits.at]
    if not backbone and not heads[0].layers:
        # the second part is about what answers, and must not only teach the estimate to distrust everything
        objective = dataclasses.replace(objective, trusted=0.0)
    weights = [*exits.modules.parameters()] if not backbone else [*model.parameters()]

    def value(given: dict[str, Any], wanted: Tensor, levels: Tensor, policy: Any) -> Tensor:
        with exits.backbone.chain().capture([policy.depth]) as kept:
            said = predict(model, given, wanted)
        head: Any = exits[policy.depth]
        estimate = head.uncertainty(kept[policy.depth], levels)
        return objective.estimated_at(said, wanted, estimate)  # type: ignore[no-any-return]

    return _train(exits, data, scheduler, weights, value, "tune", how, objective)


def _train(
    exits: Exits,
    data: Mapping[str, Tensor],
    scheduler: Any,
    weights: list[nn.Parameter],
    value: Callable[[dict[str, Any], Tensor, Tensor, Any], Tensor],
    what: str,
    how: How,
    objective: Any,
) -> TuneReport:
    """Lower `value` of each exit in turn, over all noise levels, by training `weights`; all others stay as they are."""
    accelerator = start(how)

    def draw(step: int, generator: torch.Generator) -> tuple[ExitPolicy, tuple[float, float]]:
        return build_policy("fixed", depth=exits.at[step % len(exits.at)]), (0.0, FULL)

    task, settings = Task(exits.model, data, scheduler, draw, value), {"loss": repr(objective), "exits": repr(exits)}
    with training(exits.model):
        exits.model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        return train(task, weights, what, how, accelerator, settings)
