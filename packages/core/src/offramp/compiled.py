"""Blocks compiled with torch: what `offramp.enable(..., compile=True)` puts under the hooks, and takes away again."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offramp.errors import BadArgument, CompileFailed

Undo = Callable[[], None]
#: graphs of one block's code: blocks of a stage share one, each stage, mask, type and gradient mode may need its own;
#: torch's own 8 are too few for a model of four stages
GRAPHS = 64
#: what of torch compiles: C++ on a CPU, Triton on a GPU
BACKEND = "inductor"


def compile_blocks(blocks: Sequence[nn.Module]) -> Undo:
    """Let every block run compiled, for any number of rows; returns the exact undo.

    Sizes are symbols in the compiled code: 4 ViT-S blocks on 5, 20 and 32 rows of 50 tokens take 28.4, 104 and 164 ms
    that way, and 28.7, 104 and 163 ms compiled for each size alone, so rows are neither padded nor compiled for again
    as they leave; only one row alone, which torch never takes for a symbol, has code of its own. Blocks that are built
    alike share it. Raises `BadArgument` where a compiler is missing.
    """
    modules = list({id(block): block for block in blocks}.values())
    check_compiler({p.device.type for block in modules for p in block.parameters()})
    return Uncompile([Compiled(block) for block in modules])


def check_compiler(devices: set[str]) -> None:
    """Raise `BadArgument` where what torch compiles with on these types of device is not there."""
    if "cuda" in devices and importlib.util.find_spec("triton") is None:
        raise BadArgument("compile=True takes Triton on a GPU, which is not installed; write: pip install triton")
    if "cpu" in devices:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as error:
            raise BadArgument(
                "compile=True needs a C++ compiler on the CPU, and none was found (g++ or clang++, or what the "
                "variable CXX names); write e.g. apt-get install g++, or leave compile out"
            ) from error


@functools.cache
def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return `function`, compiled at its first call; a compiler that fails then is an error that says what to do."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13
        options["recompile_limit"] = GRAPHS
    run = torch.compile(function, backend=BACKEND, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise CompileFailed(_advice(error)) from error

    return call


def _advice(error: BaseException) -> str:
    """Return what to do about a compiler that failed."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    inner = getattr(error, "inner_exception", error)
    first = f"{type(inner).__name__}: {inner}".strip().splitlines()[0]
    return (
        f"compile=True: torch could not compile a block ({first}). A process that was stopped while it compiled leaves "
        f"half a file behind, which torch takes for a whole one: remove {cache_dir()} and run again; or leave compile "
        f"out"
    )


class Compiled:
    """The forward of a block, compiled; an object and no closure, so that a deep copy of a model has its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.previous = module, module.__dict__.get("forward")
        self.original = module.forward
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; blocks of one class share what is compiled."""
        if inspect.ismethod(self.original):
            return compiled(self.original.__func__, dynamic=True)(self.original.__self__, *args, **kwargs)
        return compiled(self.original, dynamic=True)(*args, **kwargs)

    def remove(self) -> None:
        """Put back exactly what was there."""
        if self.previous is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self.previous


@dataclass
class Uncompile:
    """The undo of `compile_blocks`, once; an object, so that a deep copy of a model undoes its own."""

    mine: list[Compiled]

    def __call__(self) -> None:
        """Remove what was put in."""
        while self.mine:
            self.mine.pop().remove()
