"""How much memory a stretch of work takes at most."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType

import torch

#: Linux: writing 5 here makes the highest resident memory start anew from what is resident now (man 5 proc)
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peak:
    """Most memory that is held while the context lasts, above what was held when it began: `taken`, in bytes.

    That of the accelerator when this process uses one, else resident memory of the process, which is whole pages, so
    that only megabytes mean something. `taken` is None where the system does not say (not Linux).
    """

    def __init__(self) -> None:
        self.taken: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        self.device = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self.device:
            torch.cuda.reset_peak_memory_stats()
            self.before: int | None = torch.cuda.memory_allocated()
            return self
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:  # glibc keeps freed memory: what it kept would be taken again unseen
                trim(0)
            RESET.write_text("5")
        self.before = _resident("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        most = torch.cuda.max_memory_allocated() if self.device else _resident("VmHWM")
        self.taken = None if most is None or self.before is None else max(0, most - self.before)


def _resident(field: str) -> int | None:
    """Return a field of the process's status in bytes, None where the system has none."""
    if sys.platform != "linux":
        return None
    words = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")).split()
    return int(words[1]) * 1024
