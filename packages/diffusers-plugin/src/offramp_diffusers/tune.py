"""Train a denoiser so that its early blocks can answer where the noise level allows it, and measure where that is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp._plugins import adapt, part
from offramp._registry import create
from offramp.attach import RECORD
from offramp.enable import RUN, enable
from offramp.errors import BadArgument, NotAttached, UnsupportedModel
from offramp.loss import Loss
from offramp.policy import FULL
from offramp.record import evaluating, track
from offramp_diffusers.backbones.unet import UNetBackbone
from offramp_diffusers.facts import full_of, model_facts, parameters
from offramp_diffusers.policies.time_schedule import TimeSchedule

#: name of the adapter that LoRA-only tuning leaves on the model
ADAPTER = "early_depths"


@dataclass
class TuneReport:
    """What tuning did. losses: one per step; parameters: how many numbers were trained; seconds: wall clock."""

    losses: list[float] = field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0


def tune(
    model: Any,
    data: Mapping[str, Tensor],
    scheduler: Any,
    schedule: TimeSchedule | None = None,
    *,
    loss: str | Loss = "ase",
    steps: int = 500,
    lr: float = 1e-5,
    batch_size: int = 64,
    ema: float = 0.999,
    lora: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> TuneReport:
    """Train the denoiser at the depths of `schedule`, running for each image only the blocks of the level it drew.

    data: {"sample": clean images or latents [rows, ...], other arguments of the model by name: [rows, ...]}; scheduler:
    of diffusers, which says how noise is added and what is predicted; schedule: None trains every depth, drawn evenly,
    which is what measuring with `errors` and `fit_schedule` need; ema: decay of the average of the weights that the
    model ends with, 0 for none; lora: rank, to train only a PEFT adapter on the attention projections; options: the
    loss's. Raises `BadArgument`, `NotAttached`. Paper: ASE (arXiv 2408.05927); it runs all blocks and picks a state,
    here rows leave where their levels say, and no block runs in vain.
    """
    model = part(model)
    objective = objective_of(loss, options, "at", "level", "ase")
    depth = _check(model, data, steps, ema, schedule)
    grads = {p: p.requires_grad for p in model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    started, training = time.perf_counter(), model.training
    try:
        _prepare(model, lora)
        weights = [p for p in model.parameters() if p.requires_grad]
        report = TuneReport(parameters=sum(p.numel() for p in weights))
        optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
        average = [w.detach().clone() for w in weights] if ema else None
        model.train()
        for step in track(range(steps), "tune", progress, steps):
            optimiser.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / max(1, steps // 20))
            plan, level = _draw(schedule, depth, generator)
            with enable(model, plan):
                value = one_loss(model, data, scheduler, objective, level, batch_size, generator)
                optimiser.zero_grad(set_to_none=True)
                value.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            report.losses.append(float(value.detach()))
            for kept, now in zip(average or [], weights, strict=average is not None):
                # the average starts short: with 0.999 from step 0 it would be the untuned model
                kept.lerp_(now.detach(), 1 - min(ema, (step + 1) / (step + 10)))
        with torch.no_grad():
            for kept, now in zip(average or [], weights, strict=average is not None):
                now.copy_(kept)
    finally:
        model.train(training)
        for p, flag in grads.items():
            p.requires_grad_(flag)
    report.seconds = time.perf_counter() - started
    return report


def objective_of(loss: str | Loss, options: Mapping[str, Any], method: str, third: str, like: str) -> Any:
    """Return the loss, made by name or given; raises `BadArgument` where it lacks the method that is called here."""
    made = create(Loss, loss, **options) if isinstance(loss, str) else loss
    if not callable(getattr(made, method, None)):
        raise BadArgument(
            f"loss={loss!r} cannot train this: it has no method {method}(said, wanted, {third}); write loss={like!r}, "
            f"or give your own loss that method"
        )
    return made


def one_loss(
    model: Any,
    data: Mapping[str, Tensor],
    scheduler: Any,
    objective: Any,
    level: tuple[float, float],
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the loss of one batch at noise levels drawn evenly from `level` (from, to), 0 to 1000."""
    rows = torch.randint(len(data["sample"]), (batch_size,), generator=generator)
    given, wanted, times = noised(data, rows, scheduler, level, generator, model)
    said = predict(model, given, wanted)
    return objective.at(said, wanted, times)  # type: ignore[no-any-return]


def noised(
    data: Mapping[str, Tensor],
    rows: Tensor,
    scheduler: Any,
    between: tuple[float, float],
    generator: torch.Generator,
    model: Any,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return (arguments of the model, what it should say, noise levels [rows]) for some rows of clean data.

    between: the noise levels (from, to), 0 to 1000, that are drawn from evenly. Raises `BadArgument`.
    """
    clean = data["sample"][rows]
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    count = scheduler.config.num_train_timesteps
    low, high = (min(count - 1, int(edge / FULL * count)) for edge in between)
    times = torch.randint(low, max(low + 1, high), (len(rows),), generator=generator)
    kind = getattr(scheduler.config, "prediction_type", "flow")
    if hasattr(scheduler, "add_noise"):
        level = times.float() / count
        mixed = scheduler.add_noise(clean, noise, times)
        wanted = {"epsilon": noise, "sample": clean}.get(kind)
        wanted = scheduler.get_velocity(clean, noise, times) if kind == "v_prediction" else wanted
    else:  # flow matching: a straight line from the image to noise
        level = (times + 1).float() / count  # a sigma, and the model is told the same one
        share = level.to(clean).view(-1, *[1] * (clean.dim() - 1))
        mixed, wanted = (1 - share) * clean + share * noise, noise - clean
    if wanted is None:
        raise BadArgument(f"this scheduler predicts {kind!r}; known: epsilon, sample, v_prediction, flow matching")
    facts = model_facts(model)
    scale = full_of(facts, getattr(model, "config", {}))
    given = {k: v[rows] for k, v in data.items() if k != "sample"}
    names = parameters(type(model))  # type: ignore[arg-type]  # mypy: type[Any] is not Hashable
    place = "hidden_states" if "hidden_states" in names else "sample"
    stamp = (1 - level if facts.rising else level) * scale
    if hasattr(scheduler, "add_noise") and scale == FULL and not facts.rising:
        stamp = times  # as the scheduler counts, a whole number
    return {place: mixed, str(facts.time): stamp.to(clean.device), **given}, wanted, level * FULL


def predict(model: Any, given: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return what the model says, without the variances that some models add as more channels."""
    said: Tensor = model(**given, return_dict=False)[0]
    return said[:, : like.shape[1]] if said.shape != like.shape else said


@torch.no_grad()
def errors(
    model: Any,
    data: Mapping[str, Tensor],
    scheduler: Any,
    bins: int = 10,
    *,
    depths: Sequence[int] | None = None,
    rows: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Return how wrong each depth is in each bin of noise levels: mean squared error [bins, depths], float64.

    depths: None for every one from 1 to the full model's. Each input runs through the blocks once, and the output
    layers read the state after every depth: the same noise for all, so that differences between depths are not chance.
    Raises as `tune`, and `BadArgument` for U-Nets.
    """
    model = part(model)
    total = _check(model, data, 1, 0.0, None)
    wanted_depths = list(range(1, total + 1)) if depths is None else list(depths)
    TimeSchedule(tuple(wanted_depths)).windows(0.0, total)  # refuses depths that the model does not have
    backbone = adapt(model)
    if isinstance(backbone, UNetBackbone):
        raise BadArgument(
            f"states of {type(model).__name__} change their size from block to block, so its output layers cannot read "
            f"them: there are no errors to measure by depth"
        )
    found = torch.zeros(bins, len(wanted_depths), dtype=torch.float64)
    chain = backbone.chain()
    with evaluating(model):
        for b in track(range(bins), "measure", progress, bins):
            generator = torch.Generator().manual_seed(seed + b)
            picked = torch.randint(len(data["sample"]), (rows,), generator=generator)
            level = FULL * b / bins, FULL * (b + 1) / bins
            given, wanted, _ = noised(data, picked, scheduler, level, generator, model)
            with chain.capture(wanted_depths) as kept:
                predict(model, given, wanted)
            for j, depth in enumerate(wanted_depths):
                with chain.window(total, total, kept[depth]):  # no block runs, the output layers read the state
                    said = predict(model, given, wanted)
                found[b, j] = (said.double() - wanted.double()).square().mean()
    return found


def _draw(schedule: TimeSchedule | None, depth: int, generator: torch.Generator) -> tuple[Any, tuple[float, float]]:
    """Return (the policy of one step, the noise levels it draws from): all of them, so that no step pulls at one bin.
    """
    if schedule is None:
        schedule = TimeSchedule((int(torch.randint(1, depth + 1, (), generator=generator)),))
    return schedule, (0.0, FULL)


def _check(model: Any, data: Mapping[str, Tensor], steps: int, ema: float, schedule: Any) -> int:
    """Return the depth of the model; raises for what cannot be trained or measured so."""
    if RUN in model.__dict__ or RECORD in model.__dict__:
        raise NotAttached("tuning sets depths of its own; first: run.disable() and exits.detach()")
    depth = check_data(model, data, steps)
    if not 0 <= ema < 1:
        raise BadArgument(f"ema={ema} must be a decay from 0 up to, not including, 1")
    if schedule is not None and not isinstance(schedule, TimeSchedule):
        raise BadArgument(f"schedule={schedule!r} must be a time_schedule, or None for every depth")
    if schedule is not None:
        schedule.windows(0.0, depth)  # refuses depths that the model does not have
    return depth


def check_data(model: Any, data: Mapping[str, Tensor], steps: int) -> int:
    """Return the depth of the model; raises `UnsupportedModel`, and `BadArgument` for data nobody can train on."""
    backbone = adapt(model)
    if not backbone.timed:
        raise UnsupportedModel(f"calls of {type(model).__name__} carry no noise level, so it can have no schedule")
    if not isinstance(data, Mapping) or not isinstance(data.get("sample"), Tensor) or not len(data["sample"]):
        raise BadArgument('data must be {"sample": clean images [rows, ...], arguments of the model: [rows, ...]}')
    if odd := [k for k, v in data.items() if not isinstance(v, Tensor) or len(v) != len(data["sample"])]:
        raise BadArgument(f"data has {len(data['sample'])} samples, but {', '.join(odd)} is no tensor of as many rows")
    if steps < 1:
        raise BadArgument(f"steps={steps} must be at least 1")
    return backbone.depth


def _prepare(model: Any, lora: int | None) -> None:
    """Put a PEFT adapter on the attention projections and freeze the rest, where LoRA-only tuning is asked for."""
    if lora is None:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BadArgument("lora= needs peft: pip install peft") from error
    if isinstance(lora, bool) or not isinstance(lora, int) or lora < 1:
        raise BadArgument(f"lora={lora!r} is the rank of the adapter: a whole number, at least 1")
    model.requires_grad_(False)
    config = LoraConfig(r=lora, lora_alpha=lora, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        wanted = "attention projections called to_q, to_k, to_v and to_out.0"
        raise BadArgument(f"lora={lora} trains {wanted}: {error}") from error
