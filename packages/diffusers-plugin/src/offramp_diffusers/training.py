"""The one training loop of denoisers, through accelerate: on one process or several, and resumed exactly."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from offramp.checkpoint import read_json, read_safetensors, write_bytes, write_text
from offramp.enable import enable
from offramp.errors import BadArgument, DamagedFile
from offramp.policy import ExitPolicy
from offramp.record import evaluating, track
from offramp_diffusers.noising import Noised, noised

FORMAT = 1
#: of a checkpoint: what it is of and how far it got, written last; and what accelerate does not keep
INDEX, BESIDE = "tune.json", "tune.safetensors"


@dataclass
class TuneReport:
    """What tuning did. losses: one per step, means over processes; parameters: how many numbers were trained; seconds:
    wall clock, after a resume only since then.
    """

    losses: list[float] = field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class How:
    """How a training runs; see `offramp_diffusers.tune.tune` for what each means. Raises `BadArgument`."""

    steps: int
    lr: float
    batch_size: int
    ema: float
    seed: int
    progress: bool
    folder: str | Path | None = None
    every: int = 100
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadArgument(f"{name}={value!r} must be at least 1, a whole number")
        if not 0 <= self.ema < 1:
            raise BadArgument(f"ema={self.ema} must be a decay from 0 up to, not including, 1")
        if self.resume and self.folder is None:
            raise BadArgument("resume=True goes on from a checkpoint; say where it is: folder=...")
        found = self.folder is not None and (Path(self.folder) / INDEX).exists()
        if found and not self.resume:
            raise BadArgument(
                f"{self.folder} holds a checkpoint; go on from it with resume=True, or give another folder"
            )
        if self.resume and not found:
            raise BadArgument(f"there is no checkpoint in {self.folder} to go on from; leave resume out")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: up to `lr` over the first twentieth, then down to nothing in the end: at
        a constant one the small DiT of the demo is a tenth further from the data after 2,000 steps."""
        return self.lr * min(1.0, (step + 1) / max(1, self.steps // 20)) * (1 - step / self.steps)


@dataclass(frozen=True)
class Task:
    """What one step does. draw(step, generator): (policy it runs under, noise levels it draws from); loss(arguments of
    the model, what it should say, noise levels [rows], policy): a scalar; train: whether the model is in train mode;
    pool: arguments, what to say and levels that steps draw from instead of `data`, None for new noise at every step.
    """

    model: Any
    data: Mapping[str, Tensor]
    scheduler: Any
    draw: Callable[[int, torch.Generator], tuple[ExitPolicy, tuple[float, float]]]
    loss: Callable[[dict[str, Any], Tensor, Tensor, ExitPolicy], Tensor]
    train: bool = False
    pool: Noised | None = None


class Step(nn.Module):
    """A model and its loss as one module: processes exchange the gradients of all that its forward reaches."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.loss = task.model, task.loss

    def forward(self, given: dict[str, Any], wanted: Tensor, levels: Tensor, policy: ExitPolicy) -> Tensor:
        """Return the loss of one batch."""
        return self.loss(given, wanted, levels, policy)


def start(how: How, settings: Mapping[str, Any]) -> Any:
    """Return an `Accelerator` for this process; raises `BadArgument` where the batch cannot be shared evenly, and for a
    checkpoint of another training; settings: what it must have been made with.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # blocks after the depth of a step get no gradient; a model on its own stays where the user put it
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # without an accelerator of its own, torchrun's processes would each train alone
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(device_placement=False, cpu=cpu, kwargs_handlers=[unused])
    if how.batch_size % accelerator.num_processes:
        raise BadArgument(
            f"batch_size={how.batch_size} is the batch of all processes together, and {accelerator.num_processes} "
            f"cannot share it evenly; give a multiple"
        )
    if how.resume:
        then, now = _index(how)["settings"], _agreed(how, settings, accelerator)
        if odd := {k: (then.get(k), now.get(k)) for k in {*then, *now} if then.get(k) != now.get(k)}:
            said = "; ".join(f"{k} was {a!r} and is {b!r}" for k, (a, b) in sorted(odd.items()))
            raise BadArgument(
                f"the checkpoint in {how.folder} is of another training: {said}; give the same, or another folder"
            )
    return accelerator


def _index(how: How) -> dict[str, Any]:
    return read_json(Path(str(how.folder)) / INDEX, FORMAT, ("step", "settings", "losses"))


def _agreed(how: How, settings: Mapping[str, Any], accelerator: Any) -> dict[str, Any]:
    """Return what a checkpoint must have been made with, as it reads back: lists, not tuples."""
    mine = {k: v for k, v in asdict(how).items() if k not in ("progress", "folder", "every", "resume")}
    found = {**mine, **settings, "processes": accelerator.num_processes}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put modes and `requires_grad` of what the model holds now back when the context ends."""
    grads = {p: p.requires_grad for p in model.parameters()}
    try:
        with evaluating(model):
            yield
    finally:
        for p, flag in grads.items():
            p.requires_grad_(flag)


def train(
    task: Task, weights: list[nn.Parameter], what: str, how: How, accelerator: Any, settings: Mapping[str, Any]
) -> TuneReport:
    """Lower the task's loss by training `weights`; accelerator, settings: of `start`.

    Every process draws the whole batch and takes its share, so that several train what one would. Raises `BadArgument`,
    `DamagedFile`.
    """
    from diffusers.training_utils import EMAModel

    if accelerator.num_processes > 1:
        task.model.to(accelerator.device)
    started, generator = time.perf_counter(), torch.Generator().manual_seed(how.seed)
    report = TuneReport(parameters=sum(p.numel() for p in weights))
    task.model.train(task.train)
    optimiser: Any = torch.optim.AdamW(weights, lr=how.lr, weight_decay=0.0, fused=True)
    step, optimiser = accelerator.prepare(Step(task), optimiser)
    # its decay starts at 0.2: with 0.999 from step 0 the average would be the untuned model
    average = EMAModel(weights, decay=how.ema, foreach=True) if how.ema else None
    book = _Book(how, accelerator, _agreed(how, settings, accelerator), generator, average, report)
    try:
        done = book.load() if how.resume else 0
        show = how.progress and accelerator.is_main_process
        for number in track(range(done, how.steps), what, show, how.steps - done):
            optimiser.param_groups[0]["lr"] = how.rate(number)
            policy, level = task.draw(number, generator)
            batch = _share(task, level, how.batch_size, generator, accelerator)
            with enable(task.model, policy):
                value = step(*batch, policy)
                accelerator.backward(value)
            accelerator.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            report.losses.append(float(accelerator.reduce(value.detach(), "mean")))
            if average is not None:
                average.step(weights)
            if how.folder is not None and ((number + 1) % how.every == 0 or number + 1 == how.steps):
                book.save(number + 1)
        if average is not None:
            average.copy_to(weights)
    finally:
        accelerator.free_memory()
    report.seconds = time.perf_counter() - started
    return report


def _share(
    task: Task, level: tuple[float, float], batch_size: int, generator: torch.Generator, accelerator: Any
) -> Noised:
    """Return this process's rows of one batch, where the model is."""
    if task.pool is None:
        rows = torch.randint(len(task.data["sample"]), (batch_size,), generator=generator)
        given, wanted, levels = noised(task.data, rows, task.scheduler, level, generator, task.model)
    else:
        rows = torch.randint(len(task.pool[2]), (batch_size,), generator=generator)
        given, wanted, levels = {k: v[rows] for k, v in task.pool[0].items()}, task.pool[1][rows], task.pool[2][rows]
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    device = next(task.model.parameters()).device
    return {k: v[mine].to(device) for k, v in given.items()}, wanted[mine].to(device), levels[mine].to(device)


@dataclass
class _Book:
    """Writes and reads checkpoints: what accelerate keeps, in a folder of its own per step, and an index to the last.

    Weights are in safetensors; accelerate reads what else it writes with `weights_only`, so no file can run code.
    """

    how: How
    accelerator: Any
    settings: dict[str, Any]
    generator: torch.Generator
    average: Any
    report: TuneReport

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps, whole or not at all; the one before it goes."""
        folder = Path(str(self.how.folder))
        self.accelerator.save_state(str(folder / f"step-{step}"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shadow = [] if self.average is None else self.average.shadow_params
            kept = {f"average.{i}": p.cpu().contiguous() for i, p in enumerate(shadow)}
            kept["generator"] = self.generator.get_state()
            write_bytes(folder / f"step-{step}" / BESIDE, save_tensors(kept))
            body = {"format": FORMAT, "step": step, "settings": self.settings, "losses": self.report.losses}
            write_text(folder / INDEX, json.dumps(body, indent=2))
            for old in folder.glob("step-*"):
                if old.name != f"step-{step}":
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self) -> int:
        """Put everything back as it was written; returns how many steps that had taken."""
        folder = Path(str(self.how.folder))
        body = _index(self.how)
        place = folder / f"step-{body['step']}"
        kept, _ = read_safetensors(place / BESIDE)
        try:
            self.accelerator.load_state(str(place))
        except Exception as error:  # whatever cannot be read, as weights only, is no checkpoint
            raise DamagedFile(f"the checkpoint in {place} is not whole: {error}") from error
        self.generator.set_state(kept["generator"])
        if self.average is not None:
            self.average.optimization_step = body["step"]
            for i, shadow in enumerate(self.average.shadow_params):
                shadow.copy_(kept[f"average.{i}"])
        self.report.losses[:] = body["losses"]
        return int(body["step"])
