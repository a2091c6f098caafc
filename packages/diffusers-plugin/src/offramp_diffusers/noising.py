"""What a denoiser is trained on: clean rows mixed with noise at drawn levels, and what it should say of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp.policy import FULL
from offramp_diffusers.facts import full_of, model_facts, parameters

#: what models learn to say: of the noise, of the image, or of the way from one to the other
KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")

#: arguments of the model, what it should say, and noise levels [rows]
Noised = tuple[dict[str, Any], Tensor, Tensor]


def kind_of(scheduler: Any) -> str:
    """Return what a model says under this scheduler, one of `KINDS`; raises `BadArgument` for another, or for noise
    that is mixed in neither of the two known ways."""
    config = scheduler.config
    kind = str(config.get("prediction_type", "flow_prediction"))  # flow matching schedulers do not say it
    if kind not in KINDS:
        raise BadArgument(f"this scheduler predicts {kind!r}; known: {', '.join(KINDS)}")
    if kind != "flow_prediction" and getattr(scheduler, "alphas_cumprod", None) is None:
        raise BadArgument(
            f"{type(scheduler).__name__} has no alphas_cumprod that say how it mixes noise; give the scheduler that "
            f"the model was trained with, e.g. DDPMScheduler.from_config(pipe.scheduler.config)"
        )
    return kind


def noised(
    data: Mapping[str, Tensor],
    rows: Tensor,
    scheduler: Any,
    between: tuple[float, float],
    generator: torch.Generator,
    model: Any,
) -> Noised:
    """Return (arguments of the model, what it should say, noise levels [rows]) for some rows of clean data.

    between: the noise levels (from, to), 0 to 1000, that are drawn from evenly. Whatever the solver, the model is shown
    what its pipeline would show it: Euler's own mixture, scaled for the model, is this one. Raises `BadArgument`.
    """
    kind = kind_of(scheduler)
    clean = data["sample"][rows]
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    count = scheduler.config.num_train_timesteps
    low, high = (min(count - 1, int(edge / FULL * count)) for edge in between)
    times = torch.randint(low, max(low + 1, high), (len(rows),), generator=generator)
    if kind == "flow_prediction":  # a straight line from the image to noise
        level = (times + 1).float() / count  # a sigma, and the model is told the same one
        signal, share = 1 - level, level
    else:
        level, kept = times.float() / count, scheduler.alphas_cumprod.cpu()[times]
        signal, share = kept.sqrt(), (1 - kept).sqrt()
    a, b = (part.to(clean).view(-1, *[1] * (clean.dim() - 1)) for part in (signal, share))
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - b * clean}.get(kind, noise - clean)
    facts = model_facts(model)
    scale = full_of(facts, getattr(model, "config", {}))
    given = {k: v[rows] for k, v in data.items() if k != "sample"}
    names = parameters(type(model))  # type: ignore[arg-type]  # mypy: type[Any] is not Hashable
    place = "hidden_states" if "hidden_states" in names else "sample"
    stamp = (1 - level if facts.rising else level) * scale
    if kind != "flow_prediction" and scale == FULL and not facts.rising:
        stamp = times  # as the scheduler counts, a whole number
    return {place: a * clean + b * noise, str(facts.time): stamp.to(clean.device), **given}, wanted, level * FULL


def predict(model: Any, given: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return what the model says, without the variances that some models add as more channels."""
    said: Tensor = model(**given, return_dict=False)[0]
    return said[:, : like.shape[1]] if said.shape != like.shape else said
