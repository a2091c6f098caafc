"""Measure the kernels: every op, against how it is written without them, in milliseconds and in bandwidth."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch

from offramp import kernels
from offramp.bench_cases import CASES, OURS, Case, Way
from offramp.clock import interleaved, origin
from offramp.errors import UnknownName, did_you_mean


def seconds(ways: dict[str, Way], repeats: int) -> dict[str, float]:
    """Return the median seconds of every way; they take turns, so that a slow stretch of the machine hits all alike."""

    def called(way: Way) -> Callable[[None], Any]:
        return lambda _: way()

    timed = interleaved({name: called(way) for name, way in ways.items()}, [None] * repeats, warm=1)
    return {name: statistics.median(t.seconds for t in taken) for name, taken in timed.items()}


def copy_bandwidth(device: str, repeats: int = 5) -> float:
    """Return measured bytes per second of a copy of 256 MB, each byte read and written counted."""
    source = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds({"copy": lambda: target.copy_(source)}, repeats)["copy"]


def measure(
    only: str | None, quick: bool, repeats: int, device: str, compiled: bool, done: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return the measured table with the machine it is from; `done` is given every row as it comes.

    Raises `UnknownName` for an op without cases.
    """
    if only is not None and only not in CASES:
        raise UnknownName(f"no benchmark of a kernel is called {only!r};{did_you_mean(only, CASES)}")
    copy, table = copy_bandwidth(device), []
    for name, cases in CASES.items():
        if only not in (None, name):
            continue
        for case in cases(quick, device, compiled):
            taken = seconds(case.ways, repeats)
            for mine in (way for way in OURS if way in taken):
                table.append(_row(case, taken, mine, copy))
                done(table[-1])
    command = f"offramp bench kernels --repeats {repeats}" + f" --op {only}" * (only is not None)
    return {**machine(device, command), "copy_gb_per_s": copy / 1e9, "repeats": repeats, "rows": table}


def _row(case: Case, taken: dict[str, float], mine: str, copy: float) -> dict[str, Any]:
    others = {name: value for name, value in taken.items() if name not in OURS}
    best = min(others, key=lambda name: others[name])
    return {
        "op": case.op,
        "way": mine,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ms": {name: value * 1e3 for name, value in taken.items()},
        "best_other": best,
        "speedup": others[best] / taken[mine],
        "of_copy_bandwidth": case.moved / taken[mine] / copy,
    }


def machine(device: str, command: str) -> dict[str, Any]:
    """Return what a measured number must be read with: command, date, version, machine, selected kernels; kind: of the
    machine, short.
    """
    kind = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores, {device.upper()}"
    return {**origin(command), "kind": kind, "threads": torch.get_num_threads(), "kernels": kernels.mode()}
