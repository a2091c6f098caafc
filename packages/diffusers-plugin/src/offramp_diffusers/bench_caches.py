"""Exits and caches at equal measured quality: what each saves alone, and what they save together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from offramp.cli import step
from offramp.clock import interleaved, one_thread
from offramp_diffusers import demo, digits
from offramp_diffusers.demo_train import processes
from offramp_diffusers.ways import SAME, SETTINGS, Trial, Way

#: the solver's steps: caches live on steps that differ little, and are published at 28 to 50 of them
STEPS = 50
#: seeds of the noise that settings are chosen on, and of the noise that is reported
CHOICE, REPORT = 1000, 0


@dataclass(frozen=True)
class Size:
    """How much is sampled. rows: per way and setting, for the choice as for the report: fewer samples say a larger
    distance for all, in which 3 % are more; rounds: batches that each way is timed on."""

    rows: int = 1000
    rounds: int = 2
    steps: int = STEPS


@one_thread()
def run(console: Console, plan: demo.Plan | None = None, size: Size | None = None) -> dict[str, Any]:
    """Return the rows of the bench: full, early, every cache on the full model, and every cache on the early one."""
    from diffusers import DDIMScheduler

    plan, size = plan or demo.Plan(), size or Size()
    with processes() as pool:
        study, longest = demo.train(plan, console, pool, alone=True)
        full = study.ways[0]
        with step(console, f"tune for the fitted schedule {list(study.fitted.depths)}"):
            early = Way("early", longest.result(), study.fitted)
        ways = [full, early]
        for cache in SETTINGS:
            ways += [Way(cache, full.model, None, cache), Way(f"early + {cache}", early.model, early.policy, cache)]
        trial = study.trial(size.rows, size.steps, DDIMScheduler, pool)
        with step(console, "choose every cache's setting at equal quality"):
            most = trial.run(full, CHOICE).frechet * (1 + SAME)
            ways[2:] = [trial.fitted(way, most, CHOICE) for way in ways[2:]]
        with step(console, f"sample {len(ways)} ways with {size.steps} steps of DDIM"):
            judged = [trial.run(way, REPORT) for way in ways]
    with step(console, "time them in turns"):
        batch = digits.classes(min(size.rows, digits.BATCH))
        timed = interleaved({w.name: Timed(trial, w) for w in ways}, [batch] * size.rounds, warm=1)
    fastest = {name: min(t.seconds for t in times) for name, times in timed.items()}
    rows = [
        {
            "name": way.name, "setting": way.setting, "saved": found.saved, "frechet": found.frechet,
            "against_full": found.frechet / judged[0].frechet - 1, "accuracy": found.accuracy,
            "seconds": fastest[way.name], "speedup": fastest["full"] / fastest[way.name],
        }
        for way, found in zip(ways, judged, strict=True)
    ]  # fmt: skip
    return {"steps": size.steps, "samples": size.rows, "schedule": list(study.fitted.depths), "rows": rows}


def together(rows: list[dict[str, Any]]) -> list[str]:
    """Return one sentence per cache: whether it is faster together with exits than either alone, with the numbers."""
    by, said = {row["name"]: row for row in rows}, []
    for cache in SETTINGS:
        both, alone, early = by[f"early + {cache}"], by[cache], by["early"]
        best = max(alone["speedup"], early["speedup"])
        numbers = f"{both['speedup']:.2f}x against {alone['speedup']:.2f}x and {early['speedup']:.2f}x"
        if both["setting"] is None:
            said.append(f"early + {cache}: no setting that was tried is as good as the full model, so it adds nothing")
        elif both["speedup"] > best:
            said.append(f"early + {cache} is faster than either alone: {numbers}")
        else:
            said.append(f"early + {cache} is not faster than either alone: {numbers}; {_why(both, alone)}")
    return said


def _why(both: dict[str, Any], alone: dict[str, Any]) -> str:
    return (
        f"on exits only the setting {both['setting']} is as good as the full model, without them {alone['setting']}, "
        f"and {both['saved']:.1%} of the blocks are saved against {alone['saved']:.1%}"
    )


class Timed:
    """A way to denoise one batch, switched on outside the clock."""

    def __init__(self, trial: Trial, way: Way) -> None:
        self.trial, self.way = trial, way

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Switch the way on."""
        with self.way.on():
            yield

    def __call__(self, wanted: torch.Tensor) -> None:
        """Denoise."""
        solver: Callable[[], Any] = self.trial.solver
        for _ in digits.steps(self.way.model, solver(), self.trial.steps, wanted, REPORT):
            pass
