"""Train a denoiser so that its early blocks can answer where the noise level allows it, and measure where that is."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp._plugins import adapt, part
from offramp._registry import create
from offramp.attach import RECORD
from offramp.enable import RUN, enable, paused
from offramp.errors import BadArgument, NotAttached, UnsupportedModel
from offramp.loss import Loss
from offramp.policy import FULL
from offramp.record import digest, evaluating, track
from offramp_diffusers.backbones.unet import UNetBackbone
from offramp_diffusers.facts import parameters
from offramp_diffusers.noising import Noised, kind_of, noised, predict
from offramp_diffusers.policies.time_schedule import TimeSchedule
from offramp_diffusers.training import How, Task, TuneReport, start, train, training

#: name of the adapter that LoRA-only tuning leaves on the model
ADAPTER = "early_depths"
#: the attention projections it is on
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def tune(
    model: Any,
    data: Mapping[str, Tensor],
    scheduler: Any,
    schedule: TimeSchedule | None = None,
    *,
    teacher: Any = None,
    answers: int | None = None,
    loss: str | Loss = "ase",
    steps: int = 500,
    lr: float = 1e-5,
    batch_size: int = 64,
    ema: float = 0.999,
    lora: int | None = None,
    seed: int = 0,
    progress: bool = True,
    folder: str | Path | None = None,
    every: int = 100,
    resume: bool = False,
    **options: Any,
) -> TuneReport:
    """Train the denoiser at the depths of `schedule`, running for each image only the blocks of the level it drew.

    data: {"sample": clean images or latents [rows, ...], other arguments of the model by name: [rows, ...]}; scheduler:
    of diffusers, which says how noise is added and what is predicted; schedule: None trains every depth, drawn evenly,
    which is what measuring with `errors` and `fit_schedule` need; teacher: a copy of the model from before, whose
    answers with all blocks are learned instead of the noise that was drawn (output distillation): they vary less than
    it, so that far fewer steps do, and what comes out is as good as the teacher and no better; answers: how many noised
    rows the teacher answers before the first step, which all steps then draw from, None for new ones at every step:
    its answers take a third of the time; lr: the highest rate,
    which falls to nothing by the last step; batch_size: rows per step, of all processes together (`accelerate launch`);
    ema: decay of the average of the weights that the model ends with, 0 for none; lora: rank, to train only a PEFT
    adapter on the attention projections, which a second training goes on with; folder: where a checkpoint is written
    after `every` steps, which resume=True goes on from, to the same weights as without a break; options: the loss's.
    Raises `BadArgument`, `NotAttached`, `DamagedFile`. Paper: ASE (arXiv 2408.05927); it runs all blocks and picks a
    state, here rows leave where their levels say, and no block runs in vain.
    """
    model = part(model)
    objective = objective_of(loss, options, "at", "level", "ase")
    _check(model, data, scheduler, schedule)
    teacher = _check_teacher(model, teacher, answers)
    how = How(steps, lr, batch_size, ema, seed, progress, folder, every, resume)
    _check_lora(model, lora)
    settings = {"loss": repr(objective), "schedule": repr(schedule), "lora": lora, "model": adapt(model).fingerprint()}
    settings["teacher"], settings["answers"] = None if teacher is None else digest("teacher", teacher), answers
    accelerator = start(how, settings)

    def value(given: dict[str, Any], wanted: Tensor, levels: Tensor, policy: Any) -> Tensor:
        if teacher is not None and answers is None:
            with torch.no_grad():
                wanted = predict(teacher, given, wanted)
        return objective.at(predict(model, given, wanted), wanted, levels)  # type: ignore[no-any-return]

    depths = list(stops(model))
    with training(model), _whole(teacher, accelerator):
        pool = None if answers is None else _answered(teacher, data, scheduler, answers, how)
        task = Task(model, data, scheduler, partial(_draw, schedule, depths), value, train=True, pool=pool)
        _add_lora(model, lora)
        weights = [p for p in model.parameters() if p.requires_grad]
        return train(task, weights, "tune", how, accelerator, settings)


def _check_teacher(model: nn.Module, teacher: Any, answers: int | None) -> Any:
    """Return the denoiser to learn from, None for none; raises `BadArgument` for one that cannot teach this model."""
    if answers is not None and (teacher is None or isinstance(answers, bool) or answers < 1):
        raise BadArgument(f"answers={answers!r} is how many noised rows the teacher answers: at least 1, with teacher=")
    teacher = None if teacher is None else part(teacher)
    if teacher is not None and (teacher is model or type(teacher) is not type(model)):
        what = "the model itself, which changes" if teacher is model else f"a {type(teacher).__name__}"
        raise BadArgument(
            f"teacher= is {what}; give another {type(model).__name__}: copy.deepcopy(model) before it is tuned"
        )
    return teacher


@contextmanager
def _whole(teacher: Any, accelerator: Any) -> Iterator[None]:
    """Let the teacher answer with all of its blocks, as when it is used, where this process trains."""
    if teacher is None:
        yield
        return
    if accelerator.num_processes > 1:
        teacher.to(accelerator.device)
    with evaluating(teacher), paused(teacher):
        yield


def objective_of(loss: str | Loss, options: Mapping[str, Any], method: str, third: str, like: str) -> Any:
    """Return the loss, made by name or given; raises `BadArgument` where it lacks the method that is called here."""
    made = create(Loss, loss, **options) if isinstance(loss, str) else loss
    if not callable(getattr(made, method, None)):
        raise BadArgument(
            f"loss={loss!r} cannot train this: it has no method {method}(said, wanted, {third}); write loss={like!r}, "
            f"or give your own loss that method"
        )
    return made


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

    depths: None for all that `stops` returns. Each input runs through the blocks once, and the output layers read the
    state after every depth, in a U-ViT after the way up: the same noise for all, so that differences between depths are
    not chance. Raises as `tune`, and `BadArgument` for U-Nets.
    """
    model = part(model)
    total = _check(model, data, scheduler, None)
    backbone: Any = adapt(model)
    wanted_depths = list(backbone.stops()) if depths is None else list(depths)
    TimeSchedule(tuple(wanted_depths)).windows(0.0, total)  # refuses depths that the model does not have
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
                up = backbone.resume(depth) < total
                # on the way down of a U the rest runs again; else no block does, and the output layers read the state
                with enable(model, TimeSchedule((depth,))) if up else chain.window(total, total, kept[depth]):
                    said = predict(model, given, wanted)
                found[b, j] = (said.double() - wanted.double()).square().mean()
    return found


def stops(model: Any) -> dict[int, int]:
    """Return the depths that a schedule of this denoiser can choose from, and how many blocks run at each; in a U-ViT
    the first k and the last k at depth k. Raises `UnsupportedModel`.
    """
    backbone: Any = adapt(part(model))
    return backbone.stops()  # type: ignore[no-any-return]


@torch.no_grad()
def _answered(teacher: nn.Module, data: Mapping[str, Tensor], scheduler: Any, count: int, how: How) -> Noised:
    """Return `count` noised rows of all levels, and what the teacher says of them."""
    generator = torch.Generator().manual_seed(how.seed)
    device = next(teacher.parameters()).device
    parts = []
    for some in track(torch.arange(count).split(how.batch_size), "ask the teacher", how.progress):
        rows = torch.randint(len(data["sample"]), some.shape, generator=generator)
        given, wanted, levels = noised(data, rows, scheduler, (0.0, FULL), generator, teacher)
        said = predict(teacher, {k: v.to(device) for k, v in given.items()}, wanted)
        parts.append((given, said.cpu(), levels))
    given = {k: torch.cat([part[0][k] for part in parts]) for k in parts[0][0]}
    return given, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])


def _draw(
    schedule: TimeSchedule | None, depths: Sequence[int], step: int, generator: torch.Generator
) -> tuple[Any, Any]:
    """Return (the policy of one step, the noise levels it draws from): all of them, so that no step pulls at one bin.
    """
    if schedule is None:
        schedule = TimeSchedule((depths[int(torch.randint(len(depths), (), generator=generator))],))
    return schedule, (0.0, FULL)


def _check(model: Any, data: Mapping[str, Tensor], scheduler: Any, schedule: Any) -> int:
    """Return the depth of the model; raises for what cannot be trained or measured so."""
    if RUN in model.__dict__ or RECORD in model.__dict__:
        raise NotAttached("tuning sets depths of its own; first: run.disable() and exits.detach()")
    depth = check_data(model, data, scheduler)
    if schedule is not None and not isinstance(schedule, TimeSchedule):
        raise BadArgument(f"schedule={schedule!r} must be a time_schedule, or None for every depth")
    if schedule is not None:
        schedule.windows(0.0, depth)  # refuses depths that the model does not have
    return depth


def check_data(model: Any, data: Mapping[str, Tensor], scheduler: Any) -> int:
    """Return the depth of the model; raises `UnsupportedModel`, and `BadArgument` for data nobody can train on."""
    backbone, kind = adapt(model), type(model).__name__
    if not backbone.timed:
        raise UnsupportedModel(f"calls of {kind} carry no noise level, so it can have no schedule")
    if not isinstance(data, Mapping) or not isinstance(data.get("sample"), Tensor) or not len(data["sample"]):
        raise BadArgument('data must be {"sample": clean images [rows, ...], arguments of the model: [rows, ...]}')
    if odd := [k for k, v in data.items() if not isinstance(v, Tensor) or len(v) != len(data["sample"])]:
        raise BadArgument(f"data has {len(data['sample'])} samples, but {', '.join(odd)} is no tensor of as many rows")
    takes = parameters(type(model))  # type: ignore[arg-type]  # mypy: type[Any] is not Hashable
    if unknown := [k for k in data if k != "sample" and k not in takes]:
        raise BadArgument(f"{kind} takes no {', '.join(unknown)}; its arguments: {', '.join(list(takes)[1:])}")
    kind_of(scheduler)
    return backbone.depth


def _check_lora(model: nn.Module, lora: Any) -> None:
    """Raise `BadArgument` for an adapter that cannot be trained on this model."""
    if lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise BadArgument("lora= needs peft: pip install peft")
    if isinstance(lora, bool) or not isinstance(lora, int) or lora < 1:
        raise BadArgument(f"lora={lora!r} is the rank of the adapter: a whole number, at least 1")
    if not any(name.endswith(f".{TARGETS[0]}") for name, _ in model.named_modules()):
        raise BadArgument(
            f"lora={lora} trains attention projections called {', '.join(TARGETS)}, and {type(model).__name__} has none"
        )
    if (kept := _rank(model)) not in (None, lora):
        raise BadArgument(f"the model has an adapter {ADAPTER!r} of rank {kept} already; go on with lora={kept}")


def _rank(model: nn.Module) -> int | None:
    """Return the rank of the adapter that an earlier tuning left, None where there is none."""
    down = (p for n, p in model.named_parameters() if n.endswith(f".lora_A.{ADAPTER}.weight"))
    return next((len(p) for p in down), None)


def _add_lora(model: Any, lora: int | None) -> None:
    """Put a PEFT adapter on the attention projections, or take the one that is there, and freeze the rest."""
    if lora is None:
        return
    from peft import LoraConfig, inject_adapter_in_model

    fresh = _rank(model) is None
    config = LoraConfig(r=lora, lora_alpha=lora, target_modules=list(TARGETS))
    if fresh and hasattr(model, "add_adapter"):  # diffusers then knows of it: save_lora_adapter, disable_lora
        model.add_adapter(config, adapter_name=ADAPTER)
    elif fresh:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, p in model.named_parameters():
        p.requires_grad_(f".{ADAPTER}." in name)
