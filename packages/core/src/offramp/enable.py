"""Enable a policy on a model with exits, count what it does, and disable it exactly."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any

from torch import nn

from offramp._plugins import part
from offramp._registry import create, draft_from, lookup, policy_from
from offramp.attach import RECORD, Exits, find, load
from offramp.calibration import Calibration, promise_on
from offramp.calibrator import Certificate
from offramp.compiled import compile_blocks
from offramp.draft import DraftRule
from offramp.errors import BadArgument, NotAttached, check_options
from offramp.gate import ExitGate
from offramp.gating import gate_of, need_gate
from offramp.head import gated
from offramp.kernels.confidence import PREDICTION
from offramp.options import OPTIONS, Options
from offramp.policy import ExitPolicy, SchedulePolicy
from offramp.schedule import check_schedule
from offramp.stats import Stats as Stats

RUN = "_offramp_run"


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
        #: what `disable` calls, last one first
        self._undos: list[Callable[[], None]] = []

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
        self._undo()
        self.model.__dict__.pop(RUN, None)
        if self.loaded:
            self.exits.detach()

    def _undo(self) -> None:
        while self._undos:
            self._undos.pop()()

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
    with position_schedule, which needs no exits; window, rollback, draft_vocabulary: see `Options`; compile=True: run
    blocks compiled, from the second call on as fast as they will be (the first compiles); strict=True: raise where the
    full model would be used instead; force=True: take a calibration that was made on another model, heads or exits,
    without its certificate. Raises `NotAttached`, `BadArgument`, `UnknownName`; changes nothing then.
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
    try:
        if run.options.compile and not run.backbone.compiles:
            run._undos.append(compile_blocks(run.backbone.chain().blocks))
        run._undos.append(run.backbone.drive(run))
    except BaseException:
        run._undo()
        raise
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
