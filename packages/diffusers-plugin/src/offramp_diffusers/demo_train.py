"""How the demo of denoisers trains: several models at once, each in a process of its own."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import offramp
from offramp.clock import one_thread
from offramp.memory import freed_memory_kept
from offramp_diffusers.policies.time_schedule import TimeSchedule
from offramp_diffusers.tune import stops, tune
from offramp_diffusers.tune_heads import tune_uncertainty

#: processes at most: one for each model that is tuned to be compared
MOST = 4
#: what a process of the pool works in, to its end
_kept = ExitStack()


@contextmanager
def processes() -> Iterator[Executor]:
    """Yield a process for each core, of one thread: operations of models this small are too short for threads to share.
    """
    count = min(MOST, os.cpu_count() or 1)
    # one forked from a process that has trained cannot train
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _ready)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ready() -> None:
    _kept.enter_context(one_thread())
    _kept.enter_context(freed_memory_kept())


@dataclass(frozen=True)
class Trainer:
    """What all trainings share: the data, the full model that the others learn from, the seed, and how many answers of
    the full model a long one learns again and again, None for new ones at every step."""

    data: dict[str, Tensor]
    full: nn.Module
    seed: int
    answers: int | None = None

    @property
    def scheduler(self) -> Any:
        """Return how noise is added."""
        from diffusers import DDPMScheduler

        return DDPMScheduler()

    def tune(
        self, model: nn.Module, schedule: TimeSchedule | None, steps: int, number: int, show: bool, teacher: Any = None
    ) -> None:
        """Train the model itself; number: of the training, for its seed."""
        common: dict[str, Any] = {"batch_size": 48, "ema": 0.99, "lr": 2e-3, "progress": show, "teacher": teacher}
        if teacher is not None and self.answers is not None and self.answers < steps * common["batch_size"]:
            common["answers"] = self.answers
        seed = 10 * self.seed + number
        with torch.random.fork_rng():  # a DiT forgets one class in ten, by chance
            torch.manual_seed(seed)
            tune(model, self.data, self.scheduler, schedule, steps=steps, seed=seed, **common)

    def tuned(
        self, model: nn.Module, schedule: TimeSchedule | None, steps: int, number: int, show: bool = False
    ) -> nn.Module:
        """Return a copy that learned the full model's answers for so many steps."""
        copied = copy.deepcopy(model)
        self.tune(copied, schedule, steps, number, show, teacher=self.full)
        return copied

    def gated(self, every: nn.Module, steps: int, heads: int) -> nn.Module:
        """Return a copy of the model of every depth, tuned on for so many steps, with estimates of every exit's error.
        """
        found = self.tuned(every, None, steps, 3)
        places = stops(found)
        offramp.attach(found, at=[d for d in places if d < max(places)], head="uncertainty")
        tune_uncertainty(found, self.data, self.scheduler, steps=heads, lr=1e-2, progress=False)
        return found
