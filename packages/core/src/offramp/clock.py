"""Clocks: how long ways of doing one thing take, measured in turns, and where in the blocks of a model time goes."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from offramp._version import __version__
from offramp.enable import Stats, enable
from offramp.kernels._select import VARIABLE, mode
from offramp.memory import freed_memory_kept
from offramp.policy import ExitPolicy


def sync() -> None:
    """Wait for the accelerator, when this process uses one: its work is over later than the call that asked for it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class BlockClock:
    """Seconds spent in each block, summed over calls, while the context lasts."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.seconds = [0.0] * len(blocks)
        self.started = 0.0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put a hook before and after each block."""
        handles = []
        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self.start))
            handles.append(block.register_forward_hook(self.stopper(i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, *args: Any) -> None:
        """Start the clock of the block that is called."""
        sync()
        self.started = time.perf_counter()

    def stopper(self, index: int) -> Callable[..., None]:
        """Return the hook that stops the clock of block `index`."""

        def stop(*args: Any) -> None:
            sync()
            self.seconds[index] += time.perf_counter() - self.started

        return stop


class Clocked(BlockClock):
    """A way that runs `call` with the clock on; keeps seconds per block of every call."""

    def __init__(self, blocks: Sequence[nn.Module], call: Callable[[Any], Any]) -> None:
        super().__init__(blocks)
        self.call = call
        self.kept: list[list[float]] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Get `call` ready too, where it can be."""
        with getattr(self.call, "ready", nullcontext)(), super().ready():
            yield

    def __call__(self, item: Any) -> Any:
        """Run once."""
        self.seconds = [0.0] * len(self.blocks)
        result = self.call(item)
        self.kept.append(self.seconds)
        return result

    def after(self, start: int, last: int) -> list[float]:
        """Return the seconds that blocks `start` and deeper took, for each of the last calls."""
        return [sum(one[start:]) for one in self.kept[-last:]]


class Early:
    """A way that calls a model with a policy enabled, outside the clock; its statistics go on from call to call."""

    def __init__(self, model: Any, policy: ExitPolicy) -> None:
        self.model, self.policy, self.stats = model, policy, Stats()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Enable the policy."""
        with enable(self.model, self.policy) as run:
            run.stats = self.stats
            yield

    def __call__(self, inputs: Any) -> Any:
        """Run the model on a tensor or on keyword arguments."""
        return self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)


@dataclass
class Timed:
    """What one way did with one item: seconds, and what it returned."""

    seconds: float
    result: Any


def interleaved(
    ways: Mapping[str, Callable[[Any], Any]],
    items: Sequence[Any],
    *,
    warm: int = 2,
    step: Callable[[], None] = lambda: None,
) -> dict[str, list[Timed]]:
    """Run every way on every item and return what each did, item by item.

    For each item all ways run one after the other, starting with another one each time, so that a machine that gets
    slower or faster does so for all of them. The first `warm` items run once before, unmeasured. A way may have
    `ready()`, a context entered outside the clock, and `stats`, which are reset after the warm-up. step: called after
    each item. The garbage collector rests while the clock runs, as in `timeit`, and freed memory is kept.
    """
    names = list(ways)
    with freed_memory_kept():
        for item in items[:warm]:
            for name in names:
                _once(ways[name], item)
        for way in ways.values():
            if isinstance(stats := getattr(way, "stats", None), Stats):
                stats.reset()
        found: dict[str, list[Timed]] = {name: [] for name in names}
        for n, item in enumerate(items):
            for i in range(len(names)):
                name = names[(i + n) % len(names)]
                found[name].append(_once(ways[name], item))
            step()
    return found


def timed_with_bar(
    ways: Mapping[str, Callable[[Any], Any]], items: Sequence[Any], console: Any, what: str = "prompts"
) -> dict[str, list[Timed]]:
    """Measure with a progress bar that is drawn between items only: a thread that draws would be measured too. what:
    the items are called."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task(what, total=len(items))

        def advance() -> None:
            bar.advance(task)
            bar.refresh()

        return interleaved(ways, items, step=advance)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread inside the context: on tensors this small a second one gains 15 %, and costs ten times the
    time as soon as anything else runs on the machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _once(way: Callable[[Any], Any], item: Any) -> Timed:
    ready: Callable[[], AbstractContextManager[None]] = getattr(way, "ready", nullcontext)
    collecting = gc.isenabled()
    gc.collect(0)
    with ready():
        gc.disable()
        try:
            sync()
            start = time.perf_counter()
            result = way(item)
            sync()
            seconds = time.perf_counter() - start
        finally:
            if collecting:
                gc.enable()
    return Timed(seconds, result)


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def machine(*libraries: str) -> str:
    """Return what the numbers were measured on, in words: processor, threads, torch, and the versions of libraries."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the short name has to do
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    return (
        f"{cores} CPU cores ({name}), {threads} thread{'s' if threads != 1 else ''}, "
        + ", ".join([f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in libraries)])
    )


def origin(command: str, *libraries: str) -> dict[str, str]:
    """Return what a result must name: command, with the kernels that were asked for, machine, date and version."""
    asked = mode()
    command = command if asked == "auto" else f"{VARIABLE}={asked} {command}"
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"command": command, "machine": machine(*libraries), "date": date, "version": __version__}
