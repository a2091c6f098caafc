"""Find the list of blocks of a model, and probe a model without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from offramp.errors import UnsupportedModel


def block_list(root: nn.Module, depth: int | None, skip: str = "") -> tuple[str, nn.ModuleList]:
    """Return the outermost module list of `depth` blocks under `root`; raises `UnsupportedModel` when there is not
    one.
    """
    lists = [(n, m) for n, m in root.named_modules() if isinstance(m, nn.ModuleList) and not n.startswith("exits")]
    if skip:
        lists = [(n, m) for n, m in lists if not n.startswith(skip)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(o + ".") for o, _ in lists)]
    fitting = [(n, m) for n, m in outer if len(m) == depth] if depth else outer
    if len(fitting) != 1 or len(fitting[0][1]) < 2:
        found = ", ".join(f"{n} ({len(m)})" for n, m in outer) or "none"
        raise UnsupportedModel(
            f"{type(root).__name__}: expected one list of {depth or 'two or more'} blocks, found module lists: {found}"
        )
    return fitting[0]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Probe in eval mode without touching the random state; the mode of every module is put back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
