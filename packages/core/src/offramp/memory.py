"""How much memory a stretch of work takes at most, and what taking it costs."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

#: Linux: writing 5 here makes the highest resident memory start anew from what is resident now (man 5 proc)
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

#: of glibc (malloc.h): M_TRIM_THRESHOLD and M_MMAP_MAX, with the values that they start with
TRIM, MAPS, TRIM_AT_FIRST, MAPS_AT_FIRST = -1, -4, 128 * 1024, 65536


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
            _glibc("malloc_trim", 0)  # what is freed and kept would be taken again unseen
            RESET.write_text("5")
        self.before = _resident("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        most = torch.cuda.max_memory_allocated() if self.device else _resident("VmHWM")
        self.taken = None if most is None or self.before is None else max(0, most - self.before)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep the memory that it frees inside the context, as allocators of servers do; glibc alone.

    glibc gives tensors above 32 MB back to the system at once, and every page of the next one is then taken anew and
    filled with zeros: a Swin-T took 1.8 times as long for 64 images, and that differed from call to call by more than
    an early exit saves. Afterwards glibc's limits are those that it starts with, and adapt no more.
    """
    _glibc("mallopt", MAPS, 0)
    _glibc("mallopt", TRIM, -1)
    try:
        yield
    finally:
        _glibc("mallopt", TRIM, TRIM_AT_FIRST)
        _glibc("mallopt", MAPS, MAPS_AT_FIRST)
        _glibc("malloc_trim", 0)


def _glibc(name: str, *values: int) -> None:
    """Call a function of glibc; nothing where the system has another library."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*values)


def _resident(field: str) -> int | None:
    """Return a field of the process's status in bytes, None where the system has none."""
    if sys.platform != "linux":
        return None
    words = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")).split()
    return int(words[1]) * 1024
