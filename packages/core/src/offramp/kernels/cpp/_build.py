"""Compile a kernel for this processor, once per source, compiler and processor, and load it."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
#: from here on torch has an interface for operators that compiles in four seconds, not thirty
OLDEST = "2.10"


class Compiler(NamedTuple):
    """path: None where it is not there; missing: what to say then."""

    path: str | None
    missing: str


def compiler() -> Compiler:
    """Return the C++ compiler: what CXX says, or c++."""
    if TorchVersion(torch.__version__) < OLDEST:
        return Compiler(None, f"torch {torch.__version__} is too old for it; write: pip install 'torch>={OLDEST}'")
    name = os.environ.get("CXX") or "c++"
    said = f"there is no C++ compiler {name!r}; write e.g. apt-get install g++, or name one in CXX"
    return Compiler(shutil.which(name), said)


@functools.cache
def load(op: str) -> str | None:
    """Give torch the compiled `<op>.cpp` for its operator of that name; return None, or why it does not compile or
    load. Asked at every call, found out once.
    """
    run, missing = compiler()
    if run is None:
        return missing
    source = Path(__file__).with_name(f"{op}.cpp")
    try:
        place = _cache() / f"{op}-{_key(run, source)}.so"
        if place.exists() and _loads(place):
            return None
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / place.name
            _run([run, *FLAGS, *_of_torch(), str(source), "-o", str(made), "-ltorch_cpu", "-lc10"])
            os.replace(made, place)  # whole or not at all: a process that dies here leaves no half file to load
        torch.ops.load_library(place)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"{run} could not compile or load it: {said.strip().splitlines()[0]}"
    return None


def _of_torch() -> list[str]:
    """Return what the compiler must know of torch."""
    home = Path(torch.__file__).parent
    major, minor = map(int, OLDEST.split("."))
    version = f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}ULL"
    return [version, "-isystem", str(home / "include"), "-L", str(home / "lib")]


def _cache() -> Path:
    """Return the folder of compiled kernels, the user's own: others could put code into a shared one."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offramp" / "kernels"


def _key(command: str, source: Path) -> str:
    """Return a name for what comes out: the macros of -march=native say which instructions this processor has."""
    macros = _run([command, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    texts = [source.read_text(), *(header.read_text() for header in sorted(source.parent.glob("*.h")))]
    return hashlib.sha256("\n".join([*texts, macros, *FLAGS, torch.__version__]).encode()).hexdigest()[:16]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _loads(place: Path) -> bool:
    """Load a compiled kernel; whether that went well, as it does not with a damaged file."""
    try:
        torch.ops.load_library(place)
    except OSError:
        return False
    return True
