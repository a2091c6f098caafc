"""Measure what early exit costs itself: realised over ideal saving of every executor, and where the time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

import offramp
from offramp._plugins import plugins
from offramp.bench_kernels import machine
from offramp.clock import Clocked, Early, interleaved
from offramp.compiled import compile_blocks
from offramp.errors import UnknownName, did_you_mean
from offramp.testing.toy import ToyModel, toy_plugin

#: the executor of this package; those of plugins come by the hook `offramp_overhead`
SINGLE_PASS = "single_pass"
#: a part of a call, whose attribute it is, and the attribute's name: what is timed as that part
Place = tuple[str, Any, str]


class Clock:
    """Seconds spent in named parts; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.inner = 0.0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed as `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self.inner, start = self.inner, 0.0, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.spent[name] = self.spent.get(name, 0.0) + took - self.inner
                self.inner = before + took

        return timed

    @contextmanager
    def on(self, places: Sequence[Place]) -> Iterator[None]:
        """Time these attributes of modules and classes while the context lasts."""
        kept = []
        try:
            for name, owner, attribute in places:
                kept.append((owner, attribute, attribute in vars(owner), vars(owner).get(attribute)))
                setattr(owner, attribute, self.wrap(name, getattr(owner, attribute)))
            yield
        finally:
            for owner, attribute, own, before in reversed(kept):
                if own:
                    setattr(owner, attribute, before)
                else:
                    delattr(owner, attribute)


def breakdown(way: Callable[[Any], Any], item: Any, places: Sequence[Place], repeats: int) -> dict[str, float]:
    """Return milliseconds of one call by part, medians over repeats; "rest" is what no place accounts for: Python.

    way: as of `interleaved`; what its `ready()` hooks in stands around the timers, and so counts as rest.
    """
    found: list[dict[str, float]] = []
    for _ in range(repeats):
        clock = Clock()
        with clock.on(places), getattr(way, "ready", nullcontext)():
            clock.wrap("rest", way)(item)
        found.append(clock.spent)
    names = sorted({name for one in found for name in one})
    return {name: statistics.median(one.get(name, 0.0) for one in found) * 1e3 for name in names}


def row(
    executor: str, case: str, full: float, early: float, ideal: float, saved: float, parts: dict[str, float],
    whole: dict[str, float], compiled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return one row of the table. full, early: seconds of one call; ideal: those that the skipped blocks take in the
    full model; parts, whole: milliseconds by part of the early and of the full call; overhead, full_overhead: what each
    spends outside blocks and heads, as a share of the full call.
    """

    def overhead(spent: dict[str, float]) -> float:
        return sum(took for name, took in spent.items() if name not in ("blocks", "heads")) / sum(whole.values())

    return {
        "executor": executor,
        "case": case,
        "compiled": compiled,
        "full_ms": full * 1e3,
        "early_ms": early * 1e3,
        "saved_blocks": saved,
        "realised": (full - early) / ideal if ideal > 0 else None,
        "overhead": overhead(parts),
        "full_overhead": overhead(whole),
        "parts_ms": parts,
        "full_parts_ms": whole,
    }


def measure(executor: str | None, repeats: int, compiled: bool, **shape: int) -> dict[str, Any]:
    """Return the table of every executor, or of one. shape: of the model of the single pass. Raises `UnknownName`."""
    rows = [] if executor not in (None, SINGLE_PASS) else single_pass(**shape, repeats=repeats, compiled=compiled)
    given = plugins().manager.hook.offramp_overhead(executor=executor, repeats=repeats, compiled=compiled)
    rows += [one for several in reversed(given) for one in several]
    if not rows:
        raise UnknownName(f"no executor is called {executor!r};{did_you_mean(executor, _known())}")
    options = f" --executor {executor}" * (executor is not None) + " --compiled" * compiled
    return {**machine("cpu", f"offramp bench overhead{options}"), **shape, "repeats": repeats, "rows": rows}


def _known() -> list[str]:
    return [SINGLE_PASS, *(n for p in plugins().loaded.values() if (n := getattr(p, "EXECUTOR", None)))]


def single_pass(
    depth: int, width: int, batch: int, tokens: int, repeats: int, compiled: bool = False
) -> list[dict[str, Any]]:
    """Return rows of a classifier of `depth` blocks whose rows leave at a quarter, half and three quarters.

    Rows of the first case all leave at half of the depth, those of the second one by one where thresholds say: the
    medians of what is left. compiled: both also with compiled blocks, in the full model too.
    """
    torch.manual_seed(0)
    model = ToyModel(depth, width, classes=100, inputs=width).eval()
    x, rows = torch.randn(batch, tokens, width), []
    with torch.no_grad(), toy_plugin():
        exits = offramp.attach(model, at=[depth // 4, depth // 2, 3 * depth // 4], head="linear")
        top = offramp.record(model, x).stats["top1"]
        spread = [float(top[:, k].quantile(0.7)) for k in range(len(exits.at))]
        cases = {
            "all at half": offramp.policy("fixed", depth=depth // 2),
            "spread": offramp.policy("confidence", threshold=spread),
        }
        for compile in (False, True)[: 1 + compiled]:
            rows += [_case(name, model, exits, policy, x, repeats, compile) for name, policy in cases.items()]
    return rows


def _case(
    name: str, model: ToyModel, exits: offramp.Exits, policy: offramp.ExitPolicy, x: torch.Tensor, repeats: int,
    compile: bool,
) -> dict[str, Any]:  # fmt: skip
    undo = compile_blocks(model.blocks) if compile else None  # type: ignore[arg-type]
    full, early = Clocked(list(model.blocks), model), Early(model, policy)
    timed = interleaved({"full": model, "clocked": full, "early": early}, [x] * repeats, warm=1)
    whole, took = (statistics.median(t.seconds for t in timed[way]) for way in ("full", "early"))
    ideal = statistics.median(full.after(0, repeats)) * early.stats.saved
    places: list[Place] = [("blocks", block, "forward") for block in model.blocks]
    places += [("heads", head, "forward") for head in (model.head, *(exits[at] for at in exits.at))]
    of_full = breakdown(model, x, places, repeats)
    of_early = breakdown(early, x, [*places, ("policy", type(policy), "step")], repeats)
    if undo is not None:
        undo()
    return row(SINGLE_PASS, name, whole, took, ideal, early.stats.saved, of_early, of_full, compile)
