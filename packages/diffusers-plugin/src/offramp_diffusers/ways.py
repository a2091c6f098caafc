"""Ways to sample digits, by model, policy and cache: what each of them costs, and how good its samples are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp._plugins import adapt
from offramp.enable import enable
from offramp.policy import ExitPolicy
from offramp_diffusers import digits
from offramp_diffusers._compat import first_block_cache, mag_cache
from offramp_diffusers.deep_cache import deep_cache

#: settings of each cache, mildest first: how much the first block's residual may change from the step before; how much
#: the residual of all blocks may be off; and (blocks that always run, of eight; every how many steps the others do)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "first_block_cache": (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12),
    "mag_cache": (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2),
    "deep_cache": ((7, 2), (6, 2), (5, 2), (4, 2), (4, 3), (3, 3), (2, 3)),
}
#: as good as the full model: how much larger the Frechet distance may be
SAME = 0.03


@dataclass(frozen=True)
class Way:
    """One way to sample: a model, its policy or None for all blocks, and a cache with its setting or None."""

    name: str
    model: nn.Module
    policy: ExitPolicy | None = None
    cache: str | None = None
    setting: Any = None
    #: of mag_cache: how the residual of all blocks grows from step to step of the solver
    ratios: tuple[float, ...] = ()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Switch it on; the cache goes on top of the exits."""
        with ExitStack() as stack:
            if self.policy is not None:
                stack.enter_context(enable(self.model, self.policy))
            if self.cache is not None and self.setting is not None:
                stack.enter_context(self._cache())
            yield

    def _cache(self) -> AbstractContextManager[None]:
        if self.cache == "first_block_cache":
            return first_block_cache(self.model, self.setting)
        if self.cache == "mag_cache":
            return mag_cache(self.model, self.setting, self.ratios)
        return deep_cache(self.model, *self.setting)


@dataclass(frozen=True)
class Judged:
    """What came out of a way: distance, accuracy, share of blocks saved, seconds, and the images [rows, 1, 8, 8]."""

    frechet: float
    accuracy: float
    saved: float
    seconds: float
    images: Tensor


@dataclass(frozen=True)
class Trial:
    """How ways are judged: by whom, against which features of real images, with how many samples of how many steps of
    which solver; over: `map`, or that of a pool of processes, for the batches."""

    judge: digits.Judge
    real: Tensor
    rows: int
    steps: int
    solver: Callable[[], Any]
    over: Callable[..., Iterable[Any]] = map

    def run(self, way: Way, seed: int) -> Judged:
        """Sample and judge; the same seed gives every way the same noise. A cache starts anew with every batch, and all
        are as large, since processes wait for the largest."""
        wanted = digits.classes(self.rows).chunk(math.ceil(self.rows / digits.BATCH))
        one = partial(_batch, way, self.solver, self.steps)
        seeds = [seed * 10_000 + i for i in range(len(wanted))]
        made, ran, full, seconds = zip(*self.over(one, wanted, seeds), strict=True)
        images = torch.cat(made)
        distance, accuracy = digits.quality(self.judge, images, torch.cat(wanted), self.real)
        return Judged(distance, accuracy, 1 - sum(ran) / sum(full), sum(seconds), images)

    def fitted(self, way: Way, most: float, seed: int) -> Way:
        """Return the way with the boldest setting of its cache whose distance is at most `most`, None where none is:
        by halving, as if the distance rose with the setting."""
        settings = SETTINGS[str(way.cache)]
        if way.cache == "deep_cache":
            settings = tuple((round(always / 8 * adapt(way.model).depth), every) for always, every in settings)
        if way.cache == "mag_cache":
            way = replace(way, ratios=self.growth(way, seed))
        low, high = -1, len(settings) - 1
        while low < high:
            middle = (low + high + 1) // 2
            good = self.run(replace(way, setting=settings[middle]), seed).frechet <= most
            low, high = (middle, high) if good else (low, middle - 1)
        return replace(way, setting=settings[low] if low >= 0 else None)

    @torch.no_grad()
    def growth(self, way: Way, seed: int) -> tuple[float, ...]:
        """Return how many times larger than a step before the residual of all blocks is, mean over tokens, by step."""
        chain, found, last = adapt(way.model).chain(), [], None
        some = digits.classes(min(self.rows, digits.BATCH))
        with replace(way, cache=None).on(), chain.capture([0, len(chain.blocks)]) as kept:
            for _ in digits.steps(way.model, self.solver(), self.steps, some, seed):
                size = (kept[len(chain.blocks)] - kept[0]).norm(dim=-1)
                found.append(1.0 if last is None else float((size / last).mean()))
                last = size
        return tuple(found)


def _batch(
    way: Way, solver: Callable[[], Any], steps: int, wanted: Tensor, seed: int
) -> tuple[Tensor, int, int, float]:
    """Return (images of the classes asked for [rows, 1, 8, 8], rows times blocks that ran, and that a full model runs,
    seconds)."""
    counter = Blocks(way.model)
    with way.on(), counter:
        started = time.perf_counter()
        for x in digits.steps(way.model, solver(), steps, wanted, seed):
            last = x
        seconds = time.perf_counter() - started
    return last.clamp(-1, 1), counter.ran, counter.full, seconds


class Blocks(AbstractContextManager[Any]):
    """Counts the rows that blocks really ran on, by their feed-forward, whatever skipped the others."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ran, self.full = model, 0, 0
        self.parts: Sequence[Any] = adapt(model).chain().blocks

    def __enter__(self) -> Blocks:
        self.handles = [block.ff.register_forward_pre_hook(self._block) for block in self.parts]
        self.handles.append(self.model.register_forward_pre_hook(self._call))
        return self

    def _call(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.full += given[0].shape[0] * len(self.parts)

    def _block(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.ran += given[0].shape[0]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
