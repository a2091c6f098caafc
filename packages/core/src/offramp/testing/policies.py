"""The contract of an exit policy, as a function to call from a test: `check_policy(MyPolicy(...))`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from offramp._registry import lookup, names, policy_from
from offramp.enable import enable
from offramp.errors import BadArgument
from offramp.gate import ExitGate
from offramp.kernels.confidence import PREDICTION, confidence, cosine
from offramp.policy import Evidence, ExitPolicy, State
from offramp.record import record
from offramp.simulate import Outcome, simulate
from offramp.testing import ContractError, require

#: operations that make the host wait for the device
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
#: methods that copy to the host without an operation that a dispatch mode sees on the CPU
_COPIES = ("tolist", "numpy", "cpu", "__array__")


def check_policy(policy: ExitPolicy, depths: Sequence[int] = (2, 4, 6, 8), classes: int = 7) -> None:
    """Raise `ContractError` unless `policy`, on exits at `depths`, keeps every rule of `ExitPolicy`.

    Frozen and deterministic; round trip through its config; a bool mask [rows] on the evidence's device; state with the
    batch first; rows independent of one another and of their order; state that survives rows leaving; NaN and an empty
    batch without an error; no wait for the device; a ladder from safe to bold.
    """
    policy.check(depths)
    evidence = random_evidence(depths, classes, rows=12)
    check_value(policy)
    check_shapes(policy, evidence)
    check_rows(policy, evidence)
    check_no_wait(policy, evidence)
    check_ladder(policy, depths, classes, evidence)


def random_evidence(depths: Sequence[int], classes: int, rows: int, seed: int = 0) -> list[Evidence]:
    """Return one `Evidence` per exit for the same rows: states that settle, every statistic, one row of NaN."""
    make = torch.Generator().manual_seed(seed)
    chance = torch.Generator().manual_seed(seed + 1)
    goal, out, previous = torch.randn(rows, 8, generator=make), list[Evidence](), torch.zeros(rows, 8)
    readout = torch.randn(8, classes, generator=make)
    for index, depth in enumerate(depths):
        noise = torch.randn(rows, 8, generator=make) * torch.rand(rows, 1, generator=make) * 2
        hidden = goal + noise / (index + 1)
        if rows > 1:
            hidden[1] = float("nan")
        logits = hidden @ readout
        stats = confidence(logits, PREDICTION)
        if index:
            stats["cosine"] = cosine(hidden, previous)
        stats["gate"] = stats["top1"] * torch.rand(rows, generator=chance)
        stats["uncertainty"] = hidden[:, -1].sigmoid()
        for place, name in enumerate(names(ExitGate)):  # what gates say is a probability that follows from the state
            stats[lookup(ExitGate, name).statistic] = hidden[:, place % 8].sigmoid()
        previous, last = hidden, index == len(depths) - 1
        position = torch.arange(rows)
        out.append(Evidence(index, depth, index == 0, last, hidden, logits, classes, position, stats))
    return out


def select(seen: Evidence, rows: Tensor) -> Evidence:
    """Return the evidence of some rows (indices), as an executor passes it on once other rows have left."""
    cut: dict[str, Any] = {n: getattr(seen, n) for n in ("hidden", "prediction", "position")}
    cut = {n: None if tensor is None else tensor[rows] for n, tensor in cut.items()}
    return dataclasses.replace(seen, stats={k: v[rows] for k, v in seen.stats.items()}, **cut)


def exits_of(policy: ExitPolicy, evidence: Sequence[Evidence], rows: Tensor, leave: bool) -> Tensor:
    """Return the exit index [rows] at which each row first stops, len(evidence) for none; `leave`: stopped rows go."""
    out = torch.full((len(rows),), len(evidence))
    place, state = torch.arange(len(rows)), policy.start(len(rows), "cpu")
    for index, seen in enumerate(evidence):
        stop, state = policy.step(state, select(seen, rows[place]))
        out[place[stop]] = torch.minimum(out[place[stop]], torch.tensor(index))
        if leave:
            place, state = place[~stop], {k: v[~stop] for k, v in state.items()}
    return out


def check_value(policy: ExitPolicy) -> None:
    """Raise unless the policy is an immutable value that its own config rebuilds."""
    settings = getattr(policy, "__dataclass_params__", None)
    require(settings is not None and settings.frozen, policy, "must be a frozen dataclass: it is shared between runs")
    config = policy.config()
    try:
        text = json.dumps(config)
    except TypeError as error:
        raise ContractError(f"{type(policy).__name__}: config() must be plain JSON values ({error})") from error
    rebuilt = policy_from(json.loads(text))
    require(rebuilt == policy, policy, f"policy_from(config()) gives {rebuilt}, not {policy}; it could not be saved")


def check_shapes(policy: ExitPolicy, evidence: Sequence[Evidence]) -> None:
    """Raise unless mask and state have the batch first, for many rows and for none, and nothing given is changed."""
    for count in (0, 1, len(evidence[0].every(False))):
        rows = torch.arange(count)
        state, before = policy.start(count, "cpu"), policy.config()
        _batch_first(policy, state, count)
        for whole in evidence:
            seen = select(whole, rows)
            given = _copy(state), _copy(seen.stats)
            stop, new = policy.step(state, seen)
            right = isinstance(stop, Tensor) and stop.dtype == torch.bool and tuple(stop.shape) == (count,)
            require(right, policy, f"step must return a bool mask [{count}], not {_say(stop)}")
            require(
                stop.device == seen.every(True).device, policy, f"the mask must stay on the device, not {stop.device}"
            )
            _batch_first(policy, new, count)
            same = _alike(state, given[0]) and _alike(seen.stats, given[1])
            require(same, policy, "step changed the state or the evidence it was given in place; return new tensors")
            state = new
        require(policy.config() == before, policy, "step changed the policy itself; what changes belongs in the state")


def check_rows(policy: ExitPolicy, evidence: Sequence[Evidence]) -> None:
    """Raise unless a batch decides as its rows alone do, in any order, whether or not stopped rows leave."""
    n = len(evidence[0].every(False))
    rows = torch.arange(n)
    together = exits_of(policy, evidence, rows, leave=False)
    again = exits_of(policy, evidence, rows, leave=False)
    require(torch.equal(together, again), policy, "two runs over the same evidence differ; a policy is deterministic")
    alone = torch.cat([exits_of(policy, evidence, rows[i : i + 1], leave=False) for i in range(n)])
    require(
        torch.equal(together, alone), policy, f"rows depend on one another: {_say(together)} vs alone {_say(alone)}"
    )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    mixed = exits_of(policy, evidence, order, leave=False)
    require(torch.equal(together[order], mixed), policy, "decisions depend on the order of the rows in the batch")
    left = exits_of(policy, evidence, rows, leave=True)
    require(torch.equal(together, left), policy, "decisions change when stopped rows leave the batch and their state")


def check_no_wait(policy: ExitPolicy, evidence: Sequence[Evidence]) -> None:
    """Raise when `step` copies a tensor to the host or needs its value: the executor syncs once per exit, for all."""
    with no_wait(policy):
        state = policy.start(len(evidence[0].every(False)), "cpu")
        for seen in evidence:
            _, state = policy.step(state, seen)


def check_ladder(policy: ExitPolicy, depths: Sequence[int], classes: int, evidence: Sequence[Evidence]) -> None:
    """Raise unless `ladder` refuses, or goes from safe to bold with rungs that fit the exits."""
    try:
        rungs = policy.ladder(depths, classes)
    except BadArgument:
        return
    require(len(rungs) > 0, policy, "ladder is empty; raise BadArgument when there is nothing to calibrate")
    require(
        rungs == policy.ladder(depths, classes), policy, "ladder differs from call to call; it is fixed before data"
    )
    rows, before = torch.arange(len(evidence[0].every(False))), float("inf")
    for rung in rungs:
        rung.check(depths)
        mean = float(exits_of(rung, evidence, rows, leave=True).double().mean())
        require(
            mean <= before,
            policy,
            f"ladder is not ordered from safest to boldest: {rung} exits later than the one before",
        )
        before = mean


def check_replay(policy: ExitPolicy, model: nn.Module, data: Any, batch_size: int = 8) -> Outcome:
    """Raise unless `policy` does to the rows of a trace what it does to a model's own calls: same exits, same outputs.

    model: with exits attached; data: a tensor of rows as the model takes them. Returns what the simulation says.
    """
    trace = record(model, data, logits=True, batch_size=batch_size)
    outcome = simulate(trace, policy)
    with torch.no_grad(), enable(model, policy) as run:
        said = model(data)
        depths = run.stats.last_depths
    right = torch.equal(depths, outcome.depths)
    require(right, policy, f"the run exits at {_say(depths)}, the simulation at {_say(outcome.depths)}")
    assumed: Any = trace.logits
    wanted = assumed[torch.arange(len(data)), outcome.columns]
    close = torch.allclose(said.cpu().float(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    require(close, policy, "the run answers other than the exits of the simulation do")
    return outcome


@contextmanager
def no_wait(who: object) -> Iterator[None]:
    """Return a context in which reading a tensor's value on the host raises `ContractError`."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.split("::")[-1]
            by_mask = name == "index" and any(
                isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
            )
            require(
                name not in _SYNCS and not by_mask, who, f"step waits for the device (aten::{name}); stay on tensors"
            )
            return func(*args, **(kwargs or {}))

    kept = {name: getattr(Tensor, name) for name in _COPIES}

    def refuse(name: str) -> Any:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise ContractError(f"{type(who).__name__}: step copies to the host (Tensor.{name}); stay on tensors")

        return method

    try:
        for name in _COPIES:
            setattr(Tensor, name, refuse(name))
        with Watch():  # type: ignore[no-untyped-call]
            yield
    finally:
        for name, method in kept.items():
            setattr(Tensor, name, method)


def _batch_first(policy: ExitPolicy, state: State, count: int) -> None:
    for name, tensor in state.items():
        right = isinstance(tensor, Tensor) and tensor.dim() > 0 and tensor.shape[0] == count
        require(right, policy, f"state {name!r} must have the batch of {count} as dimension 0, not {_say(tensor)}")


def _copy(tensors: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in tensors.items()}


def _alike(one: Any, other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.nan_to_num(one[k].double()), torch.nan_to_num(other[k].double())) for k in other
    )


def _say(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.tolist()) if value.dim() == 1 and len(value) <= 16 else f"{value.dtype} {list(value.shape)}"
    return repr(value)
