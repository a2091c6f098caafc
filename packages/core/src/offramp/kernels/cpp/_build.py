"""Compile a kernel for this processor, once per source, compiler and processor, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class Compiler(NamedTuple):
    """path: None where it is not there; missing: what to say then."""

    path: str | None
    missing: str


def compiler() -> Compiler:
    """Return the C++ compiler: what CXX says, or c++."""
    name = os.environ.get("CXX") or "c++"
    said = f"there is no C++ compiler {name!r}; write e.g. apt-get install g++, or name one in CXX"
    return Compiler(shutil.which(name), said)


@functools.cache
def library(op: str) -> ctypes.CDLL | str:
    """Return the compiled `<op>.cpp`, or why it does not compile or load; asked at every call, found out once."""
    run, missing = compiler()
    if run is None:
        return missing
    source = Path(__file__).with_name(f"{op}.cpp")
    try:
        place = _cache() / f"{op}-{_key(run, source.read_bytes())}.so"
        if place.exists() and (found := _load(place)) is not None:
            return found
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / place.name
            _run([run, *FLAGS, str(source), "-o", str(made)])
            os.replace(made, place)  # whole or not at all: a process that dies here leaves no half file to load
        return ctypes.CDLL(str(place))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"{run} could not compile or load it: {said.strip().splitlines()[0]}"


def _cache() -> Path:
    """Return the folder of compiled kernels, the user's own: others could put code into a shared one."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offramp" / "kernels"


def _key(command: str, source: bytes) -> str:
    """Return a name for what comes out: the macros of -march=native say which instructions this processor has."""
    macros = _run([command, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    return hashlib.sha256(source + macros.encode() + " ".join(FLAGS).encode()).hexdigest()[:16]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _load(place: Path) -> ctypes.CDLL | None:
    """Return a compiled kernel, None for a damaged file."""
    try:
        return ctypes.CDLL(str(place))
    except OSError:
        return None
