"""`offramp demo diffusion`: train a small DiT on real digits, tune its early depths, fit a schedule, and compare."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from offramp.cli import dump_json, step
from offramp.clock import origin
from offramp.enable import enable
from offramp_diffusers import digits
from offramp_diffusers._compat import first_block_cache
from offramp_diffusers.fit_schedule import fit_schedule
from offramp_diffusers.policies.time_schedule import TimeSchedule, two_stage
from offramp_diffusers.tune import errors, tune

#: share of the blocks that the fitted schedule may run
BUDGET = 0.7
#: relative changes of the first block's residual up to which FirstBlockCache reuses the rest: the boldest is taken
#: whose distance is within SAME of the full model's, on noise that is not used again
THRESHOLDS, SAME = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12), 0.03


@dataclass(frozen=True)
class Plan:
    """How long each part takes. base, any_depth, last: training steps; rows: samples per way; solver: its steps."""

    base: int = 1200
    any_depth: int = 400
    last: int = 400
    rows: int = 400
    solver: int = 20
    judge: int = 600


QUICK = Plan(20, 10, 10, 40, 4, 20)


@dataclass
class Way:
    """One way to sample: a model, its schedule or None for all blocks, and a cache threshold or None."""

    name: str
    model: nn.Module
    schedule: TimeSchedule | None = None
    threshold: float | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Switch it on; the cache goes on top of the exits."""
        with ExitStack() as stack:
            if self.schedule is not None:
                stack.enter_context(enable(self.model, self.schedule))
            if self.threshold is not None:
                stack.enter_context(first_block_cache(self.model, self.threshold))
            yield


@dataclass
class Study:
    """What was trained: the classifier, the untuned model, the ways by name, and the errors of every depth."""

    judge: digits.Judge
    judged: float
    ways: list[Way]
    errors: Tensor
    images: Tensor
    rows: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[str, Tensor] = field(default_factory=dict)


def run(folder: Path, quick: bool, console: Console) -> dict[str, Any]:
    """Write report.json and report.html into `folder`, and return what the JSON holds."""
    from offramp.checkpoint import write_text
    from offramp_diffusers.page import html

    started, plan = time.perf_counter(), QUICK if quick else Plan()
    study = train(plan, console)
    with step(console, "choose thresholds for the cache at equal quality"):
        choose_thresholds(study, plan)
    with step(console, f"sample with {len(_solvers())} solvers, {len(study.ways)} ways each"):
        measure(study, plan)
    body = body_of(study, plan, time.perf_counter() - started)
    write_text(folder / "report.json", dump_json(body))
    write_text(folder / "report.html", html(body, study.grids))
    return body


def train(plan: Plan, console: Console) -> Study:
    """Train everything that is compared. The tuned models go on from the same untuned one."""
    from diffusers import DDPMScheduler

    scheduler, show = DDPMScheduler(), console.is_terminal
    images, labels = digits.load()
    data = {"sample": images, "class_labels": labels}
    with step(console, "train a classifier to judge samples with"):
        judge, accuracy = digits.train_judge(images, labels, plan.judge, show)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits.make()
        depth = len(model.transformer_blocks)  # type: ignore[arg-type]
        common = {"batch_size": 48, "ema": 0.99, "progress": show}
        with step(console, f"train a DiT of {depth} blocks on {len(images)} digits"):
            tune(model, data, scheduler, TimeSchedule((depth,)), steps=plan.base, lr=2e-3, **common)  # type: ignore[arg-type]
        tuned = copy.deepcopy(model)
        with step(console, "train every depth a little, so that they can be compared"):
            tune(tuned, data, scheduler, steps=plan.any_depth, lr=1e-3, seed=1, **common)  # type: ignore[arg-type]
        with step(console, "measure every depth at every noise level, and solve for the schedule"):
            table = errors(tuned, data, scheduler, progress=show)
            fitted = fit_schedule(table, BUDGET)
        fixed, other = two_stage(depth // 2, depth, 400.0), copy.deepcopy(tuned)
        with step(console, f"tune for the fitted schedule {list(fitted.depths)}"):
            tune(tuned, data, scheduler, fitted, steps=plan.last, lr=1e-3, seed=2, **common)  # type: ignore[arg-type]
        with step(console, f"tune for the fixed two-stage schedule {list(fixed.depths)}"):
            tune(other, data, scheduler, fixed, steps=plan.last, lr=1e-3, seed=2, **common)  # type: ignore[arg-type]
        longer = copy.deepcopy(model)
        with step(console, "train the full model as much longer, so that training is not what is compared"):
            more = plan.any_depth + plan.last
            tune(longer, data, scheduler, TimeSchedule((depth,)), steps=more, lr=1e-3, seed=3, **common)  # type: ignore[arg-type]
    ways = [
        Way("full", longer),
        Way("early", tuned, fitted),
        Way("two_stage", other, fixed),
        Way("early, untuned", longer, fitted),
        Way("first_block_cache", longer, None, THRESHOLDS[0]),
        Way("early + first_block_cache", tuned, fitted, THRESHOLDS[0]),
    ]
    return Study(judge, accuracy, ways, table, images)


def _solvers() -> dict[str, Callable[[], Any]]:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    return {
        "DDIM": DDIMScheduler,
        "DPM-Solver++": DPMSolverMultistepScheduler,
        "UniPC": UniPCMultistepScheduler,
    }


def measure(study: Study, plan: Plan) -> None:
    """Sample every way with every solver, each solver from noise of its own, the ways of one solver from the same."""
    for seed, (name, solver) in enumerate(_solvers().items()):
        for way in study.ways:
            counter = Blocks(way.model)
            with way.on(), counter:
                images, wanted, seconds = digits.sample(way.model, solver(), plan.solver, plan.rows, seed)
            distance, accuracy = digits.quality(study.judge, images, wanted, study.images)
            study.rows.append(
                {
                    "solver": name, "seed": seed, "name": way.name, "seconds": seconds, "frechet": distance,
                    "accuracy": accuracy, "saved": 1 - counter.ran / counter.full,
                }
            )  # fmt: skip
            if seed == 0:
                study.grids[way.name] = images[:30]


def choose_thresholds(study: Study, plan: Plan) -> None:
    """Give each way with a cache the boldest threshold at which it is as good as the full model; the mildest where none
    is."""
    made, seed = next(iter(_solvers().values())), 1000

    def distance(way: Way) -> float:
        with way.on():
            images, wanted, _ = digits.sample(way.model, made(), plan.solver, plan.rows, seed)
        return digits.quality(study.judge, images, wanted, study.images)[0]

    most = distance(study.ways[0]) * (1 + SAME)
    for way in study.ways:
        if way.threshold is None:
            continue
        for threshold in THRESHOLDS:
            tried = Way(way.name, way.model, way.schedule, threshold)
            if distance(tried) > most:
                break
            way.threshold = threshold


class Blocks(AbstractContextManager[Any]):
    """Counts the blocks that really ran, by their feed-forward, whatever skipped the others."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ran, self.full = model, 0, 0

    def __enter__(self) -> Blocks:
        blocks: Any = self.model.transformer_blocks
        self.handles = [block.ff.register_forward_pre_hook(self._block) for block in blocks]
        self.handles.append(self.model.register_forward_pre_hook(self._call))
        return self

    def _block(self, *_: Any) -> None:
        self.ran += 1

    def _call(self, *_: Any) -> None:
        self.full += len(self.handles) - 1

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def body_of(study: Study, plan: Plan, seconds: float) -> dict[str, Any]:
    """Return the JSON of the report."""
    rows = [_mean([r for r in study.rows if r["name"] == way.name]) for way in study.ways]
    full = rows[0]
    for row in rows:
        row["speedup"] = full["seconds"] / row["seconds"]
        row["against_full"] = row["frechet"] / full["frechet"] - 1
    return {
        "format": 1,
        "title": "offramp demo diffusion",
        **origin("offramp demo diffusion" + (" --quick" if plan == QUICK else ""), "diffusers"),
        "model": f"DiT, {study.errors.shape[1]} blocks, trained here on scikit-learn's digits",
        "seconds": seconds,
        "samples": plan.rows,
        "solver_steps": plan.solver,
        "judge_accuracy": study.judged,
        "thresholds": {way.name: way.threshold for way in study.ways if way.threshold is not None},
        "schedules": {way.name: list(way.schedule.depths) for way in study.ways if way.schedule},
        "cuts": {way.name: list(way.schedule.cuts) for way in study.ways if way.schedule},
        "errors": study.errors.tolist(),
        "ways": rows,
        "runs": study.rows,
    }


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": rows[0]["name"]}
    for key in ("seconds", "frechet", "accuracy", "saved"):
        found[key] = sum(r[key] for r in rows) / len(rows)
    found["frechet_by_seed"] = [r["frechet"] for r in rows]
    return found
