"""Enable a policy on a model with exits, count what it does, and disable it exactly."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from offramp._plugins import part
from offramp._registry import create, draft_from, lookup, policy_from
from offramp.attach import RECORD, Exits, find, load
from offramp.calibration import Calibration, promise_on
from offramp.calibrator import Certificate
from offramp.draft import DraftRule
from offramp.errors import BadArgument, NotAttached, check_options
from offramp.gate import ExitGate
from offramp.gating import gate_of, need_gate
from offramp.head import gated
from offramp.kernels.confidence import PREDICTION
from offramp.options import OPTIONS, Options
from offramp.policy import ExitPolicy, SchedulePolicy
from offramp.schedule import check_schedule

RUN = "_offramp_run"


@dataclass
class Stats:
    """What really ran. One unit of `blocks_run` is one call of one block for one row.

    rows: rows or tokens decided; exits: how many stopped at each depth; blocks_full: what the full model would have
    run; nonfinite: looks at an exit that could not stop a row because its evidence was not finite; last_depths: exit
    depth of each row (token) of the last call. Generation adds tokens, rounds (visits of the deepest block), drafted
    and accepted tokens, projected: blocks of which only keys and values were computed (kv="propagate"), and busy:
    seconds inside blocks, heads and readout (verified, on a CPU). A token that runs a block again counts again.
    """

    rows: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    blocks_run: int = 0
    blocks_full: int = 0
    nonfinite: int = 0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    projected: int = 0
    busy: float = 0.0
    last_depths: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    @property
    def saved(self) -> float:
        """Share of block executions that did not happen: 1 - run / full."""
        return 1.0 - self.blocks_run / self.blocks_full if self.blocks_full else 0.0

    @property
    def depth_mean(self) -> float:
        """Mean depth at which rows (tokens) were decided."""
        return sum(d * n for d, n in self.exits.items()) / self.rows if self.rows else 0.0

    def count(self, depths: Tensor) -> None:
        """Take in the exit depth of every row of one call. depths: int64 [rows]."""
        self.rows += depths.numel()
        values, counts = depths.unique(return_counts=True)
        for depth, n in zip(values.tolist(), counts.tolist(), strict=True):
            self.exits[depth] = self.exits.get(depth, 0) + n

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "last_depths"}
        out["exits"] = dict(sorted(self.exits.items()))
        return {**out, "saved": self.saved, "depth_mean": self.depth_mean, "last_depths": self.last_depths.tolist()}

    def reset(self) -> None:
        """Start counting anew."""
        fresh = Stats()
        for f in fields(self):
            setattr(self, f.name, getattr(fresh, f.name))


class Run:
    """A policy enabled on a model; a context manager that disables on leaving."""

    def __init__(self, exits: Exits, policy: ExitPolicy, options: Options) -> None:
        check_schedule(exits, policy, options)
        if "gate" in policy.statistics():
            gated(exits, trained=True)
        self.exits, self.policy, self.options = exits, policy, options
        self.model, self.backbone = exits.model, exits.backbone
        for statistic in policy.statistics():
            if (name := gate_of(statistic)) is not None:
                need_gate(exits, name, trained=True)
        #: the gate beside the exits, which policies ask for by the name of its statistic
        self.gate: ExitGate | None = None if exits.gate is None else exits.gate_module
        #: whether evidence of an exit takes the state at the exit before
        self.looks_back = "cosine" in policy.statistics() or (self.gate is not None and self.gate.looks_back)
        if "cosine" in policy.statistics() and exits.whole:
            raise BadArgument(
                f"{type(policy).__name__} compares the states of neighbouring exits, and heads {exits.head!r} read "
                f'whole states of any shape; use "confidence", or heads that read pooled states (head="linear")'
            )
        self.stats = Stats()
        #: what is promised for this run, None where nothing is
        self.certificate: Certificate | None = None
        self.paused = False
        #: what a decoding driver remembers between calls (e.g. how often drafts were accepted)
        self.memory: dict[Any, Any] = {}
        #: whether `enable` also loaded the exits, so that `disable` takes them off again
        self.loaded = False
        self._undo: Callable[[], None] | None = None

    @cached_property
    def rule(self) -> DraftRule:
        """How tokens are drafted with verify=True; raises `BadArgument` when it does not fit the exits."""
        rule = draft_from(self.options.draft)
        rule.check(self.exits.at, self.exits.head, self.exits.mixes)
        return rule

    @property
    def enabled(self) -> bool:
        """Whether this run is the one acting on the model."""
        return self.model.__dict__.get(RUN) is self

    def disable(self) -> None:
        """Stop exiting early; the model's calls are exactly the framework's again. Does nothing the second time."""
        if not self.enabled:
            return
        if self._undo is not None:
            self._undo()
        self.model.__dict__.pop(RUN, None)
        if self.loaded:
            self.exits.detach()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        return f"Run({self.policy}, {self.options}, {state})"


def make_policy(
    policy: str | ExitPolicy | Calibration | Mapping[str, Any], depths: Sequence[int], **config: Any
) -> ExitPolicy:
    """Return a policy from a name with options, an object, a calibration or a config dict, checked against the exits.
    """
    made = build_policy(policy, **config)
    made.check(tuple(depths))
    return made


def check_outputs(policy: ExitPolicy, outputs: int) -> None:
    """Raise `BadArgument` for a policy that reads probabilities or classes where heads predict a single number."""
    if outputs == 1 and (looks := sorted(policy.statistics() & PREDICTION)):
        raise BadArgument(
            f"{type(policy).__name__} looks at {', '.join(looks)}, and heads with one output have no classes; use "
            f'offramp.policy("patience", patience=2, tolerance=0.1) or offramp.policy("agreement", threshold=0.1)'
        )


def build_policy(policy: str | ExitPolicy | Calibration | Mapping[str, Any], **config: Any) -> ExitPolicy:
    """Return a policy from a name with options, an object, a calibration or a config dict."""
    if isinstance(policy, str):
        made: ExitPolicy = create(ExitPolicy, policy, **config)
    else:
        if config:
            raise BadArgument(f"options {sorted(config)} go with a policy's name, not with {type(policy).__name__}")
        if isinstance(policy, Calibration):
            made = policy.policy
        elif isinstance(policy, Mapping):
            made = policy_from(dict(policy))
        elif isinstance(policy, ExitPolicy):
            made = policy
        else:
            raise BadArgument(f"policy must be a name, a policy or a calibration, not {type(policy).__name__}")
    return made


def parse_flag(flag: Mapping[str, Any]) -> tuple[dict[str, Any], Options, str | None]:
    """Split the `early_exit` dict into policy config, options and exits source; raises `UnknownName` for odd keys."""
    if not isinstance(flag, Mapping) or "policy" not in flag:
        raise BadArgument(f'early_exit must be a dict with a "policy", e.g. {{"policy": "confidence"}}; got {flag!r}')
    cls = lookup(ExitPolicy, flag["policy"])
    known = [*inspect.signature(cls).parameters, *OPTIONS, "policy", "exits"]
    check_options(flag, known, f"early_exit with policy {flag['policy']!r}")
    config = {k: v for k, v in flag.items() if k not in (*OPTIONS, "exits")}
    return config, Options(**{k: v for k, v in flag.items() if k in OPTIONS}), flag.get("exits")


def enable(
    model: nn.Module, policy: str | ExitPolicy | Calibration | None = None, *, force: bool = False, **options: Any
) -> Run:
    """Let `model` exit early; its own calls stay as they are. Returns a `Run` with `stats` and `disable()`.

    policy: a name of `offramp.names(offramp.ExitPolicy)` with its options (`threshold=0.9`), a policy object, a
    `Calibration`, or None for the `early_exit` dict of the model's own config. verify=True: every early token is
    checked by the deep blocks (lossless); draft: a rule of `offramp.names(offramp.DraftRule)`, with options as
    {"rule": name, ...}, or a number of tokens; kv: "catch_up", "propagate" or "recompute" without verify, "schedule"
    with position_schedule, which needs no exits; window: most tokens that wait for the deep blocks; rollback: see
    `Options`; strict=True: raise where the full model would be used instead; force=True: take a calibration that was
    made on another model, heads or exits, without its certificate. Raises `NotAttached`, `BadArgument`, `UnknownName`;
    changes nothing then.
    """
    model = part(model)
    if RUN in model.__dict__:
        raise NotAttached("a policy is already enabled on this model; first: run.disable()")
    if policy is None:
        return _enable_flag(model, options)
    chosen = {k: options.pop(k) for k in OPTIONS if k in options}
    if isinstance(policy, Calibration):
        chosen = {**policy.options, **chosen}
    made = build_policy(policy, **options)
    exits = find(model, needed=not isinstance(made, SchedulePolicy))
    made.check(exits.at)
    run = Run(exits, made, Options(**chosen))
    if isinstance(policy, Calibration):
        run.certificate = _promise(exits, policy, chosen, force)
    return _start(run)


def _promise(exits: Exits, calibration: Calibration, chosen: Mapping[str, Any], force: bool) -> Certificate | None:
    """Return the certificate that holds for this run; raises for other weights, warns when it runs otherwise."""
    from offramp.record import fingerprint

    certificate = promise_on(calibration, fingerprint(exits), force)
    if certificate is None:
        return None
    odd = {k: v for k, v in calibration.options.items() if chosen[k] != v}
    if odd:
        warnings.warn(
            f"this calibration was made with {odd}: its certificate does not hold for other options; leave them out, "
            f"or record with them and calibrate again",
            UserWarning,
            stacklevel=3,
        )
        return None
    return certificate


def _start(run: Run) -> Run:
    run._undo = run.backbone.drive(run)
    run.model.__dict__[RUN] = run
    return run


def _enable_flag(model: nn.Module, options: dict[str, Any]) -> Run:
    from offramp._plugins import adapt

    if options:
        raise BadArgument(
            f"options {sorted(options)} need a policy: offramp.enable(model, 'confidence', threshold=0.9)"
        )
    attached = model.__dict__.get(RECORD)
    backbone = attached.backbone if attached is not None else adapt(model)
    flag = backbone.flag()
    if flag is None:
        raise BadArgument(
            "no policy given and the model's config has no early_exit; write "
            'offramp.enable(model, "confidence", threshold=0.9) or set config.early_exit = {"policy": ...}'
        )
    config, chosen, source = parse_flag(flag)
    made = policy_from(config)
    needed = not isinstance(made, SchedulePolicy)
    exits = find(model, needed) if source is None or attached is not None else load(model, source)
    try:
        made.check(exits.at)
        run = _start(Run(exits, made, chosen))
        run.loaded = attached is None
        return run
    except BaseException:
        if attached is None:
            exits.detach()
        raise


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Run the full model inside this context, whatever is enabled."""
    run = model.__dict__.get(RUN)
    if run is None:
        yield
        return
    before, run.paused = run.paused, True
    try:
        yield
    finally:
        run.paused = before
