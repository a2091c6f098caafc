"""Which implementation of an op runs: one environment variable, read at every call, and a reason where it cannot be."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from offramp.errors import BadArgument, UnknownName, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])
VARIABLE = "OFFRAMP_KERNELS"
MODES = ("auto", "torch", "cpp", "triton", "cuda")
IMPLEMENTATIONS = MODES[2:]
#: what was said already: once per op, implementation and reason
_said: set[tuple[str, str, str]] = set()


def ops() -> list[str]:
    """Return the sorted names of the ops: the files of this folder."""
    return list(_stems("offramp.kernels"))


def available(op: str, device: str = "cpu") -> dict[str, str | None]:
    """Return for each implementation of `op` None, or why it cannot run on tensors of this device type.

    Raises `UnknownName`.
    """
    if op not in ops():
        raise UnknownName(f"no kernel is called {op!r};{did_you_mean(op, ops())}")
    return {"torch": None, **{name: missing(op, name, device) for name in IMPLEMENTATIONS}}


def mode() -> str:
    """Return what OFFRAMP_KERNELS asks for; raises `UnknownName` for anything but one of `MODES`."""
    found = os.environ.get(VARIABLE) or "auto"
    if found not in MODES:
        raise UnknownName(f"{VARIABLE}={found!r} is not known;{did_you_mean(found, MODES)}")
    return found


def select(op: str, reference: F, *tensors: Tensor) -> F:
    """Return the function that computes `op` for these tensors: that of the chosen implementation, or `reference`.

    Kernels have no gradient: where one is asked for, the reference runs. An implementation that is missing is named in
    one warning per reason, and the reference runs. Raises `BadArgument` for tensors of several devices.
    """
    device = tensors[0].device
    for other in tensors[1:]:
        if other.device != device:
            raise BadArgument(f"{op} was given tensors on {device} and on {other.device}; move them to one device")
    asked = mode()
    if asked == "torch" or (asked == "auto" and device.type == "cpu"):
        return reference
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return reference
    implementation = "triton" if asked == "auto" else asked
    built = implementation == "cpp" and device.type == "cpu" and op in _stems("offramp.kernels.cpp")
    why = not_built(op) if built else missing(op, implementation, device.type)
    if why is None:
        found: F = getattr(importlib.import_module(f"offramp.kernels.{implementation}.{op}"), op)
        return found
    say(op, implementation, why)
    return reference


def say(op: str, implementation: str, why: str) -> None:
    """Warn, once per reason, that torch runs an op instead of what was asked for."""
    if (op, implementation, why) not in _said:
        _said.add((op, implementation, why))
        warnings.warn(f"{op}: {implementation} is not used: {why}; torch runs instead", UserWarning, stacklevel=4)


def missing(op: str, implementation: str, device: str) -> str | None:
    """Return why `implementation` cannot run `op` on tensors of this device type, or None."""
    if implementation == "cuda":
        # without a GPU to measure on nobody can say where CUDA C++ beats the Triton kernel, so there is none
        return "there are no CUDA C++ kernels; OFFRAMP_KERNELS=auto takes the Triton ones"
    if implementation == "cpp":
        return _missing_cpp(op, device)
    if op not in _stems("offramp.kernels.triton"):
        return "it has no Triton kernel: it is made of torch operations alone"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; write: pip install triton"
    from triton import knobs

    if device != "cuda" and not (device == "cpu" and knobs.runtime.interpret):
        return f"Triton does not compile for {device!r}; set TRITON_INTERPRET=1 to step through its kernels on the CPU"
    return None


def _missing_cpp(op: str, device: str) -> str | None:
    from offramp.kernels.cpp._build import compiler

    if device != "cpu":
        return f"C++ kernels run on the CPU, not on {device!r}; OFFRAMP_KERNELS=auto takes the Triton ones there"
    if op not in _stems("offramp.kernels.cpp"):
        return "it has no C++ kernel: none was 1.3 times as fast as torch"
    found = compiler()
    return None if found.path else found.missing


def not_built(op: str) -> str | None:
    """Return why the C++ of `op` does not compile or load here; compiles it where that was not done yet."""
    from offramp.kernels.cpp._build import load

    importlib.import_module(f"offramp.kernels.cpp.{op}")  # torch has to know the operator before the C++ of it
    return load(op)


@functools.cache
def _stems(package: str) -> tuple[str, ...]:
    module = importlib.import_module(package)
    found = pkgutil.iter_modules(module.__path__)
    return tuple(sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_")))
