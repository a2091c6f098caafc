"""Peak memory of each way: on the CPU of a fresh process that does nothing else, on a GPU of its allocator."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import offramp
from offramp.enable import Stats
from offramp_hf.measure import Generate
from offramp_hf.prepare import load


def from_disk(source: Path, exits: str | Path) -> Any:
    """Return a model with its exits, for a fresh process."""
    model, _ = load(source)
    offramp.load(model, exits)
    return model


def peaks(
    ways: Mapping[str, Generate], ids: Tensor, build: Callable[[], Any], assistant: Path | None = None
) -> dict[str, int]:
    """Return the peak memory in bytes of each way that offramp or the framework drives, on one prompt [batch, tokens].

    build: makes the model in a fresh process (a process's high-water mark never falls, so ways cannot share one); the
    figure is that process's whole resident memory, weights and libraries included. On a GPU: the most allocated.
    """
    found = {}
    for name, way in ways.items():
        if ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            with way.ready():
                way(ids)
            found[name] = torch.cuda.max_memory_allocated()
        elif type(way) is Generate:  # another package's engine holds the model and cannot be sent
            sent = replace(way, model=None, memory={}, stats=Stats())
            if "assistant_model" in sent.arguments:
                sent.arguments = {**sent.arguments, "assistant_model": None}
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found[name] = pool.submit(_child, sent, ids, build, assistant, torch.get_num_threads()).result()
    return found


def _child(way: Generate, ids: Tensor, build: Callable[[], Any], assistant: Path | None, threads: int) -> int:
    torch.set_num_threads(threads)
    way.model = build()
    if "assistant_model" in way.arguments and assistant is not None:
        way.arguments = {**way.arguments, "assistant_model": load(assistant)[0]}
    with way.ready():
        way(ids)
    return high_water()


def high_water() -> int:
    """Return the most memory this process has held, in bytes; on Linux `ru_maxrss` would start from the parent's."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
