"""`offramp demo diffusion`: train a small DiT on real digits, tune its early depths, fit a schedule, and compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from offramp.cli import dump_json, step
from offramp.clock import one_thread, origin
from offramp.errors import BadArgument
from offramp.memory import freed_memory_kept
from offramp.policy import FULL
from offramp_diffusers import digits
from offramp_diffusers.demo_train import Trainer, processes
from offramp_diffusers.fit_schedule import fit_schedule
from offramp_diffusers.policies.time_schedule import TimeSchedule, two_stage
from offramp_diffusers.policies.uncertainty import Uncertainty
from offramp_diffusers.tune import errors, stops
from offramp_diffusers.ways import SAME, Trial, Way

#: share of the blocks that the fitted schedule may run; never deeper for more noise: without that rule the same table
#: gave [7, 8, 7, 8, 6, 6, 3, 3, 4, 4], by chance in the errors
BUDGET = 0.7
#: share of the blocks that DuoDiff runs above noise level 300: 3 of 13; all of them below
DUO = 3 / 13
#: seeds that nothing else is sampled with: of the noise that settings are chosen on, and that the spread is taken over
CHOICE, OTHERS = 1000, (2000, 2001)


@dataclass(frozen=True)
class Plan:
    """How long each part takes. base, more, others, measured, heads, judge: training steps (of the full model, the one
    with the fitted schedule, those it is compared with, ...); rows: samples per way; choice: rows that settings are
    chosen on; solver: its steps; answers: what `tune` asks the full model for, None for new noise at every step."""

    base: int = 2000
    more: int = 600
    others: int = 600
    measured: int = 200
    heads: int = 300
    rows: int = 2000
    choice: int = 500
    solver: int = 20
    judge: int = 600
    answers: int | None = None


#: the U-ViT takes twice as long for a step, and learns more slowly to do without its middle: 600 steps leave it 14 %
#: from the full model
PLANS = {"dit": Plan(), "uvit": Plan(base=1000, more=2500, rows=800, answers=24_000)}
#: the cache that is shown: diffusers' own do not know the blocks of the U-ViT
CACHES = {"dit": "first_block_cache", "uvit": "deep_cache"}
QUICK = Plan(8, 6, 6, 3, 2, 40, 20, 3, 5)


@dataclass
class Study:
    """What was trained: the kind of model, the classifier and how often it is right, the ways, the full model first,
    the errors of every depth, the schedule that was fitted to them, the features of real images; and what came out: a
    row per solver and way, images by way, and the full model's distance with other seeds."""

    model: str
    judge: digits.Judge
    judged: float
    ways: list[Way]
    errors: Tensor
    fitted: TimeSchedule
    real: Tensor
    rows: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[str, Tensor] = field(default_factory=dict)
    again: list[float] = field(default_factory=list)

    def trial(self, rows: int, steps: int, solver: Callable[[], Any], pool: Executor) -> Trial:
        """Return how ways are judged, by the processes of `pool`."""
        return Trial(self.judge, self.real, rows, steps, solver, pool.map)


@one_thread()
@freed_memory_kept()
def run(folder: Path, quick: bool, console: Console, model: str = "dit", seed: int = 0) -> dict[str, Any]:
    """Write report.json and report.html into `folder`, and return what the JSON holds; model: of `digits.MODELS`; seed:
    of the trainings."""
    from offramp.checkpoint import write_text
    from offramp_diffusers.page import html

    if model not in digits.MODELS:
        raise BadArgument(f"no model is called {model!r}; known: {', '.join(digits.MODELS)}")
    started, plan = time.perf_counter(), QUICK if quick else PLANS[model]
    with processes() as pool:
        study, longest = train(plan, console, pool, model, seed)
        trial = study.trial(plan.choice, plan.solver, next(iter(solvers().values())), pool)
        with step(console, "meanwhile choose the cache's setting at equal quality, the gate's at equal blocks"):
            most = choose(study, trial)
        with step(console, "wait for the model with the fitted schedule, and choose its cache's setting"):
            add_early(study, longest.result(), trial, most)
        with step(console, f"sample with {len(solvers())} solvers, {len(study.ways)} ways each"):
            measure(study, plan, pool)
    body = body_of(study, plan, seed, time.perf_counter() - started)
    write_text(folder / "report.json", dump_json(body))
    write_text(folder / "report.html", html(body, study.grids))
    return body


def train(
    plan: Plan, console: Console, pool: Executor, name: str = "dit", seed: int = 0, alone: bool = False
) -> tuple[Study, Future[nn.Module]]:
    """Train everything that is compared, and return it with what the model with the fitted schedule will come from,
    which takes longest. All go on from the full model, and learn its answers, each in a process of `pool`; alone: only
    the full model and that one."""
    images, labels = digits.load()
    show = console.is_terminal
    judged = pool.submit(digits.train_judge, images, labels, plan.judge)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        full = digits.MODELS[name]()
    places = stops(full)
    depth = max(places)
    trainer = Trainer({"sample": images, "class_labels": labels}, full, seed, plan.answers)
    what = f"a {name} of {depth} blocks on {len(images)} digits"
    with step(console, f"train {what}, and beside it a classifier to judge samples with"):
        trainer.tune(full, TimeSchedule((depth,)), plan.base, 0, show)
        judge, accuracy = judged.result()
    shallow = min(places, key=lambda d: abs(places[d] - DUO * places[depth]))
    fixed = two_stage(shallow, depth)  # its table is published, so that nothing has to be measured first
    jobs = [] if alone else [(Way("two_stage", full, fixed), pool.submit(trainer.tuned, full, fixed, plan.others, 2))]
    with step(console, "tune every depth a little, so that they can be compared"):
        every = trainer.tuned(full, None, plan.measured, 1, show)
    with step(console, "measure every depth at every noise level, and solve for the schedule"):
        table = errors(every, trainer.data, trainer.scheduler, progress=show)
    fitted = fit_schedule(table, BUDGET, stops=places, monotone=True)
    longest = pool.submit(trainer.tuned, full, fitted, plan.more, 2, show)
    ways = [Way("full", full)]
    if not alone:
        deep = fixed.cuts[0] / FULL
        bold = fit_schedule(table, deep + (1 - deep) * places[shallow] / places[depth], stops=places, monotone=True)
        gated = pool.submit(trainer.gated, every, plan.others - plan.measured, plan.heads)
        jobs.append((Way("early, bolder", full, bold), pool.submit(trainer.tuned, full, bold, plan.others, 2)))
        jobs.append((Way("uncertainty", full, Uncertainty(0.5)), gated))
        with step(console, f"tune for the fitted schedule {list(fitted.depths)}, and beside it {len(jobs)} others"):
            ways += [replace(way, model=job.result()) for way, job in jobs]
        ways += [Way("early, untuned", full, fitted), Way(CACHES[name], full, None, CACHES[name])]
    with torch.no_grad():
        return Study(name, judge, accuracy, ways, table, fitted, judge.features(images)), longest


def solvers() -> dict[str, Callable[[], Any]]:
    """Return the solvers that the demo samples with."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    return {
        "DDIM": DDIMScheduler,
        "DPM-Solver++": DPMSolverMultistepScheduler,
        "UniPC": UniPCMultistepScheduler,
    }


def choose(study: Study, trial: Trial) -> float:
    """Give the cache the boldest setting that is as good as the full model, and the gate the threshold that runs as
    many blocks as the schedule, on noise that is not used again; returns the largest distance that is as good."""
    most = trial.run(study.ways[0], CHOICE).frechet * (1 + SAME)
    saved = trial.run(Way("early, untuned", study.ways[0].model, study.fitted), CHOICE).saved
    for i, way in enumerate(study.ways):
        if way.cache is not None:
            study.ways[i] = trial.fitted(way, most, CHOICE)
        if way.name == "uncertainty":
            study.ways[i] = _as_bold(trial, way, saved)
    return most


def add_early(study: Study, model: nn.Module, trial: Trial, most: float) -> None:
    """Add the model with the fitted schedule, alone and with the cache as bold as the distance `most` allows."""
    cache = CACHES[study.model]
    both = trial.fitted(Way(f"early + {cache}", model, study.fitted, cache), most, CHOICE)
    study.ways[1:] = [Way("early", model, study.fitted), *study.ways[1:], both]


def _as_bold(trial: Trial, way: Way, saved: float) -> Way:
    """Return the way with the threshold that saves as many blocks, by halving."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        found = trial.run(replace(way, policy=Uncertainty(middle)), CHOICE).saved
        low, high = (low, middle) if found > saved else (middle, high)
    return replace(way, policy=Uncertainty(high))


def measure(study: Study, plan: Plan, pool: Executor) -> None:
    """Sample every way with every solver, each solver from noise of its own, the ways of one solver from the same; then
    the full model again with other seeds, to see what chance does."""
    for seed, (name, solver) in enumerate(solvers().items()):
        trial = study.trial(plan.rows, plan.solver, solver, pool)
        for way in study.ways:
            found = trial.run(way, seed)
            study.rows.append(
                {
                    "solver": name, "seed": seed, "name": way.name, "seconds": found.seconds, "frechet": found.frechet,
                    "accuracy": found.accuracy, "saved": found.saved,
                }
            )  # fmt: skip
            if seed == 0:
                study.grids[way.name] = found.images[:30]
    trial = study.trial(plan.rows, plan.solver, next(iter(solvers().values())), pool)
    study.again = [trial.run(study.ways[0], seed).frechet for seed in OTHERS]


def body_of(study: Study, plan: Plan, seed: int, seconds: float) -> dict[str, Any]:
    """Return the JSON of the report."""
    rows = [_mean([r for r in study.rows if r["name"] == way.name]) for way in study.ways]
    full = rows[0]
    for row in rows:
        row["speedup"] = full["seconds"] / row["seconds"]
        row["against_full"] = row["frechet"] / full["frechet"] - 1
        pairs = zip(row["frechet_by_seed"], full["frechet_by_seed"], strict=True)
        row["against_full_by_seed"] = [mine / its - 1 for mine, its in pairs]
    again = [study.rows[0]["frechet"], *study.again]
    command = "offramp demo diffusion" + f" --model {study.model}" * (study.model != "dit")
    command += f" --seed {seed}" * (seed != 0)
    plans = {way.name: way.policy for way in study.ways if isinstance(way.policy, TimeSchedule)}
    places = stops(study.ways[0].model)
    return {
        "format": 2,
        "title": "offramp demo diffusion",
        **origin(command + " --quick" * (plan == QUICK), "diffusers"),
        "model": f"{study.model}, {max(places)} blocks, trained here on scikit-learn's digits",
        "seconds": seconds,
        "steps": {"full": plan.base, "early": plan.more, "others": plan.others},
        "samples": plan.rows,
        "solver_steps": plan.solver,
        "judge_accuracy": study.judged,
        "settings": {way.name: way.setting for way in study.ways if way.cache is not None},
        "thresholds": {w.name: w.policy.threshold for w in study.ways if isinstance(w.policy, Uncertainty)},
        "stops": {"depths": list(places), "blocks": list(places.values())},
        "schedules": {name: list(found.depths) for name, found in plans.items()},
        "cuts": {name: list(found.cuts) for name, found in plans.items()},
        "spread": {"frechet": again, "relative": statistics.stdev(again) / statistics.mean(again)},
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
