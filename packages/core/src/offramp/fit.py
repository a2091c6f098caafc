"""Train the heads and gates of a model's exits; a frozen backbone's states are computed once and reused."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp._registry import create
from offramp.attach import Exits, find
from offramp.backbone import Observed
from offramp.enable import paused
from offramp.errors import BadArgument
from offramp.gating import need_gate
from offramp.head import gated
from offramp.live import CACHE_BYTES, Live, same, share_gradient
from offramp.loss import Loss, Moment, Schedule
from offramp.policy import SchedulePolicy
from offramp.record import batches, batches_in, evaluating, track
from offramp.schedule import check_training
from offramp.stages import Stage, plan


@dataclass
class FitReport:
    """What training did. losses: one per step; agreement: share of rows on which each exit says what the full model
    says, by depth, before and after, on the last 10 % of the rows (held out when there is more than one batch).
    """

    losses: list[float] = field(default_factory=list)
    before: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


def fit(
    model: nn.Module,
    data: Any,
    *,
    loss: str | Loss | None = None,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 8,
    rows: int = 2048,
    seed: int = 0,
    progress: bool = True,
    backbone: bool = False,
    layer_dropout: float = 0.0,
    schedule: str | SchedulePolicy | None = None,
    weight_decay: float = 0.0,
    weights: Schedule | None = None,
    **options: Any,
) -> FitReport:
    """Train all heads together on `data`, or the gates, as the loss says, with the backbone frozen unless asked.

    data: as for `record` (labels only for loss="labels"); batch_size: rows of the model's own input per
    forward; rows: samples (tokens) per step; lr: AdamW's, cosine to zero with 5 % warm-up; options: the loss's
    (`temperature`, `weighting`, ...). backbone: train the model too, on one batch per step (`rows` has no meaning
    then); layer_dropout: rate of the last block, per sample, rising with depth (arXiv 2404.16710);
    schedule: "frozen", "joint", "two_stage" or "alternate", see `offramp.stages.plan`; or a policy such as
    position_schedule that the model is trained to be decoded with (then exits are not
    needed; labels of -100 mark the prompt, and without labels the first token is the prompt); weights: a schedule of
    the exits' weights, beside the last layer's where the loss has it, else of the whole loss. loss: None is "distill",
    with such a policy "layerskip", which also trains the last layer. Raises `NotAttached`, `UnknownName`,
    `BadArgument`. The model's modes and `requires_grad` are put back.
    """
    fixed = None if schedule is None or isinstance(schedule, str) else schedule
    exits = find(model, needed=fixed is None)
    model = exits.model  # of a pipeline, the part that has them
    objective = _objective(loss or ("distill" if fixed is None else "layerskip"), options)
    stages = plan(schedule if isinstance(schedule, str) else None, objective, steps, backbone)
    for stage in stages:  # all of them, before the first changes anything
        _check(exits, stage, layer_dropout, fixed)
    data = exits.backbone.batched(data, batch_size, seed)
    started = time.perf_counter()
    grads = {p: p.requires_grad for p in model.parameters()}
    report = FitReport()
    try:
        with evaluating(model), paused(model):
            for n, stage in enumerate(stages):
                if stage.backbone or exits.mixes or exits.live:
                    taps, even = stage.loss.taps(exits.at, exits.backbone.depth), stage.loss.equilibrium
                    deepest = stage.loss.deepest
                    frozen = not stage.backbone
                    source: Any = Live(exits, data, batch_size, seed, layer_dropout, fixed, frozen, taps, even, deepest)
                else:
                    source = _States(exits, data, batch_size, rows, seed, stage.loss.deepest, progress)
                report.before = report.before if n else source.agreement()
                _train(exits, source, stage, report, lr, weight_decay, weights, progress)
                report.agreement = source.agreement()
    finally:
        for p, flag in grads.items():
            p.requires_grad_(flag)
    report.seconds = time.perf_counter() - started
    return report


def _objective(loss: str | Loss, options: dict[str, Any]) -> Loss:
    if isinstance(loss, str):
        made: Loss = create(Loss, loss, **options)
        return made
    if options:
        raise BadArgument(f"options {sorted(options)} go with a loss's name, not with {type(loss).__name__}")
    return loss


def _check(exits: Exits, stage: Stage, dropout: float, schedule: SchedulePolicy | None) -> None:
    """Raise `BadArgument` or `NotAttached` for what cannot be trained so."""
    depth, objective, steps, backbone = exits.backbone.depth, stage.loss, stage.steps, stage.backbone
    if objective.beside:
        need_gate(exits, objective.beside)
    objective.check(exits)
    if schedule is not None:
        check_training(schedule, backbone, depth)
    if steps < 1:
        raise BadArgument(f"steps={steps} trains nothing; give steps=500")
    if backbone and objective.frozen:
        raise BadArgument(f"{objective} teaches heads or gates about a model as it is; leave backbone=True out")
    if objective.equilibrium and not backbone:
        raise BadArgument(f"{objective} is about the gradients of the model itself; add backbone=True")
    if not backbone and objective.taps(exits.at, depth):
        raise BadArgument(f"{objective} trains states of the model itself; add backbone=True")
    if not 0 <= dropout < 1 or (dropout and not backbone):
        raise BadArgument(f"layer_dropout={dropout!r} is a rate from 0 to 1 for training with backbone=True")
    if not wanted(exits, stage):
        raise BadArgument(
            f"head {exits.head!r} has no weights of its own to train here; use head='translator', or backbone=True"
        )


def wanted(exits: Exits, stage: Stage) -> list[nn.Parameter]:
    """Return the parameters that a stage trains, each once."""
    if stage.backbone:
        return everything(exits)
    heads = trainable(exits, stage.loss.gate, stage.loss.shared)
    return heads + trainable(exits, shared=True) if stage.loss.beside else heads


def trainable(exits: Exits, gate: bool | None = None, shared: bool = False) -> list[nn.Parameter]:
    """Return the heads' own parameters: not those shared with the backbone, nor base weights under LoRA.

    gate: only those of the heads' gates (True), all but those (False), or all; shared: instead those of the gate that
    all exits share, never among the others. Raises `BadArgument` for heads without gates, `NotAttached` without the
    shared one.
    """
    if shared:
        return list(exits.gate_module.parameters())
    gates = type(gated(exits)[0] if gate else exits[exits.at[0]]).gates
    base = {id(p) for name, p in exits.model.named_parameters(remove_duplicate=False) if not name.startswith("exits.")}
    base |= set() if exits.gate is None else {id(p) for p in exits.gate_module.parameters()}
    own = {n: p for n, p in exits.modules.named_parameters() if id(p) not in base and ".base_layer." not in n}
    return [p for n, p in own.items() if gate is None or n.partition(".")[2].startswith(gates) is gate]


def everything(exits: Exits) -> list[nn.Parameter]:
    """Return the parameters of the model and of its heads, each once, in floating point."""
    return [p for p in exits.model.parameters() if p.is_floating_point()]


def _train(
    exits: Exits,
    source: Any,
    stage: Stage,
    report: FitReport,
    lr: float,
    weight_decay: float,
    weights: Schedule | None,
    progress: bool,
) -> None:
    own, steps = wanted(exits, stage), stage.steps
    for p in exits.model.parameters():
        p.requires_grad_(False)
    for p in own:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=weight_decay)
    warm = max(1, steps // 20)
    shape = lambda s: min(1.0, (s + 1) / warm) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    losses = []
    with torch.enable_grad():
        for step, seen in zip(track(range(steps), "fit exits", progress, steps), source, strict=False):
            scale = 1.0 if weights is None else weights.at(step)
            with learning(exits):
                value = objective_of(exits, stage.loss, seen, step, steps, scale)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(value.detach())
    report.losses += torch.stack(losses).tolist()


@contextmanager
def learning(exits: Exits) -> Iterator[None]:
    """Put heads with batch norm into train mode inside this context, and all heads into eval mode after it."""
    modal = [exits[depth] for depth in exits if type(exits[depth]).modal]
    for head in modal:
        head.train()
    try:
        yield
    finally:
        for head in modal:
            head.eval()


def objective_of(
    exits: Exits, loss: Loss, seen: Observed, step: int = 0, steps: int = 1, scale: float = 1.0
) -> Tensor:
    """Return what step `step` of `steps` minimises on one batch; scale: of the exits' weights."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and seen.final.requires_grad):
        final = exits.backbone.context().readout(seen.final)
    hidden = exits.inputs(seen)
    if seen.last is not None:
        hidden.append(seen.last)
    if loss.equilibrium:  # the other half of it is on the states' way down, in `Live`
        hidden = [share_gradient(h, 1 / (len(hidden) - i)) for i, h in enumerate(hidden)]
    return value_of(exits, loss, hidden, final, seen, step, steps, scale)


def value_of(
    exits: Exits,
    loss: Loss,
    hidden: Sequence[Tensor],
    final: Tensor,
    seen: Observed,
    step: int = 0,
    steps: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """Return the loss of one batch. hidden: as for `Loss.read`; final: the full model's prediction."""
    active = loss.active(step, steps, len(exits))
    answers, targets, more = loss.read(exits, hidden, final, seen.targets, active)
    odds = exits.odds(hidden, answers) if loss.beside else None
    depths = (*(exits.at[i] for i in active), exits.backbone.depth)
    moment = Moment(scale, depths, seen.states, odds, step, steps, more)
    return loss(answers, final, targets, active, len(exits), moment)


class _States:
    """Rows of hidden states in random order, endlessly; the last tenth is kept for the report."""

    def __init__(self, exits: Exits, data: Any, size: int, rows: int, seed: int, deepest: bool, show: bool) -> None:
        self.exits, self.rows = exits, rows
        self.generator = torch.Generator().manual_seed(seed)
        parts, held = [], 0
        with torch.no_grad():
            for batch in track(batches(data, size), "gather states", show, batches_in(data, size)):
                parts.append(one := exits.observe(batch, deepest=deepest))
                held += sum(h.numel() * h.element_size() for h in one.kept())
                if held > CACHE_BYTES:
                    warnings.warn(
                        f"fit uses the first {len(parts)} batches: their states fill {held} bytes", stacklevel=4
                    )
                    break
        if not parts or not sum(len(p.final) for p in parts):
            raise BadArgument("the data holds no rows; give at least one batch")
        self.all = Observed(
            [torch.cat([p.hidden[i] for p in parts]) for i in range(len(exits.at))],
            torch.cat([p.final for p in parts]),
            _joined([p.targets for p in parts]),
            last=_joined([p.last for p in parts]),
        )
        n = len(self.all.final)
        self.train = max(1, n - n // 10)

    def at(self, index: Tensor) -> Observed:
        index = index.to(self.all.final.device)
        targets = None if self.all.targets is None else self.all.targets[index]
        last = None if self.all.last is None else self.all.last[index]
        return Observed([h[index] for h in self.all.hidden], self.all.final[index], targets, last=last)

    def __iter__(self) -> Iterator[Observed]:
        while True:
            for index in torch.randperm(self.train, generator=self.generator).split(self.rows):
                yield self.at(index)

    @torch.no_grad()
    def agreement(self) -> dict[int, float]:
        n = len(self.all.final)
        index = torch.arange(self.train if self.train < n else 0, n)
        hits = dict.fromkeys(self.exits.at, 0.0)
        for part in index.split(self.rows):
            seen = self.at(part)
            final = self.exits.backbone.context().readout(seen.final)
            for depth, hidden in zip(self.exits.at, seen.hidden, strict=True):
                hits[depth] += same(self.exits[depth](hidden), final)
        return {d: v / len(index) for d, v in hits.items()}


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows of all parts; None where the first has none."""
    return None if parts[0] is None else torch.cat([p for p in parts if p is not None])
