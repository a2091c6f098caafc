"""Record a trace: what every exit would have said on a data set, and what the full model said."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.attach import Exits, find
from offramp.costs import check_unit, measure
from offramp.enable import paused
from offramp.errors import BadArgument
from offramp.head import ask_in_turn
from offramp.kernels.confidence import confidence, cosine
from offramp.kernels.subset_logits import among
from offramp.loss import row_losses
from offramp.trace import Trace

STATISTICS = frozenset({"top1", "margin", "entropy", "energy", "label"})
#: what `_one` returns beside statistics
BESIDE = ("label", "position", "targets", "losses", "logits", "classes")


def check_size(batch_size: Any) -> None:
    """Raise `BadArgument` for what is no number of rows."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise BadArgument(f"batch_size={batch_size!r} must be a positive number of rows, e.g. batch_size=8")


def batches(data: Any, batch_size: int) -> Iterator[Any]:
    """Yield batches of the user's data: a tensor or a mapping of tensors is cut into `batch_size` rows, an iterable of
    batches (a DataLoader, a list) is passed on. Raises `BadArgument` for anything else."""
    check_size(batch_size)
    if isinstance(data, Tensor):
        yield from data.split(batch_size)
    elif isinstance(data, Mapping):
        tensors = {k: v for k, v in data.items() if isinstance(v, Tensor)}
        n = next((len(v) for v in tensors.values()), 0)
        for i in range(0, n, batch_size):
            yield {k: v[i : i + batch_size] if k in tensors else v for k, v in data.items()}
    elif isinstance(data, Iterable) and not isinstance(data, str):
        yield from data
    else:
        raise BadArgument(
            f"data must be a tensor, a mapping of tensors or an iterable of batches, not {type(data).__name__}"
        )


def batches_in(data: Any, batch_size: int) -> int | None:
    """Return how many batches `batches` yields, None where only going through the data would tell."""
    check_size(batch_size)
    if isinstance(data, Mapping):
        data = next((v for v in data.values() if isinstance(v, Tensor)), ())
    elif not isinstance(data, Tensor):
        return len(data) if hasattr(data, "__len__") else None
    return -(-len(data) // batch_size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode inside this context, and each back into its own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def fingerprint(exits: Exits) -> str:
    """Return a digest of the model and its heads: shapes and a few values of every weight."""
    return digest(repr(exits.backbone.fingerprint()), exits.model)


def digest(said: str, model: nn.Module) -> str:
    """Return 16 hexadecimal digits of `said` and of shapes and a few values of every weight."""
    found = hashlib.sha256(said.encode())
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)[:: max(1, value.numel() // 16)][:16].cpu().double()
        found.update(f"{name}{tuple(value.shape)}".encode() + flat.numpy().tobytes())
    return found.hexdigest()[:16]


def record(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 8,
    per_row: int | None = None,
    seed: int = 0,
    logits: bool = False,
    costs: str = "blocks",
    progress: bool = False,
) -> Trace:
    """Run the full model over `data` and keep what every exit said; nothing exits early here.

    data: a tensor, a mapping or an iterable of batches as the model takes them, or a data set of the model's framework
    (a plugin says which). Each row is one sample; a language
    model gives one sample per token, and `per_row=1` keeps one random position per sequence, so that samples are
    independent as certificates need. logits: keep the logits too (for method "temperature"). costs: the unit of
    `Trace.costs`: "blocks", or "flops" or "seconds" per row, both measured on the first batch. A cascade is recorded
    too, one column per model. Raises `NotAttached`, `BadArgument`.
    """
    from offramp.cascade import Cascade

    check_unit(costs)
    if isinstance(model, Cascade):
        return model.record(batches(data, batch_size), logits=logits, costs=costs, progress=progress)
    exits = find(model)
    model = exits.model  # of a pipeline, the part that has them
    spent: Tensor | None = None
    parts: list[dict[str, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), paused(model), torch.no_grad():
        data = exits.backbone.batched(data, batch_size)
        for batch in track(batches(data, batch_size), "record", progress, batches_in(data, batch_size)):
            spent = measure(exits, batch, costs) if spent is None else spent
            parts.append(_one(exits, batch, per_row, generator, logits))
    if not parts or not sum(len(p["label"]) for p in parts):
        raise BadArgument("the data holds no rows; give at least one batch")
    return _join(exits, parts, spent, costs)


def _one(exits: Exits, batch: Any, per_row: int | None, generator: torch.Generator, logits: bool) -> dict[str, Tensor]:
    seen = exits.observe(batch)
    keep = _pick(seen.sample, per_row, generator) if per_row and seen.sample is not None else None

    def cut(rows: Tensor) -> Tensor:
        return rows if keep is None else rows[keep.to(rows.device)]

    states = [cut(h) for h in seen.hidden]
    final = cut(seen.final)
    answers = [exits[d](cut(h)) for d, h in zip(exits.at, exits.inputs(seen), strict=True)]
    answers.append(exits.backbone.context().readout(final))
    columns = [confidence(a, STATISTICS) for a in answers]
    one = {k: torch.stack([c[k] for c in columns], 1).cpu() for k in columns[0]}
    heads: list[Any] = [exits[d] for d in exits.at]
    if type(heads[0]).gates and all(head.trained for head in heads):
        found, candidates = ask_in_turn(heads, states, answers[0])
        gates = [g.sigmoid() * among(a, candidates) for g, a in zip(found, answers, strict=False)]
        one["gate"] = torch.stack([*gates, torch.full_like(gates[0], float("nan"))], 1).cpu()
    chain = [*states, final]
    near = [torch.full((len(final),), float("nan"), device=final.device)]
    near += [_near(a, b) for a, b in zip(chain[:-1], chain[1:], strict=True)]
    one["cosine"] = torch.stack(near, 1).cpu()
    if exits.gate is not None and exits.gate_module.trained:  # the full model agrees with itself, and always stops
        said = exits.odds(states, answers[:-1]).sigmoid()
        one[exits.gate_module.statistic] = torch.cat([said, torch.ones_like(said[:, :1])], 1).cpu()
    if seen.position is not None:
        one["position"] = cut(seen.position).cpu()
    if seen.targets is not None:
        targets = cut(seen.targets)
        one["losses"] = torch.stack([row_losses(a, targets) for a in answers], 1).cpu()
        if not targets.is_floating_point():  # of numbers only the losses say how right an exit is
            one["targets"] = targets.cpu()
    if logits:
        one["logits"] = torch.stack(answers, 1).float().cpu()
    one["classes"] = torch.tensor([answers[0].shape[-1]])
    return one


def _near(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine [rows] of states at neighbouring exits; NaN where they are no two vectors of one width."""
    alike = before.dim() == 2 and before.shape == after.shape
    return cosine(after, before) if alike else after.new_full((len(after),), float("nan"))


def _pick(sample: Tensor, per_row: int, generator: torch.Generator) -> Tensor:
    """Return the indices of `per_row` random places of each sample, in order."""
    order = torch.rand(len(sample), generator=generator)
    kept = []
    for value in sample.cpu().unique():
        places = (sample.cpu() == value).nonzero().squeeze(-1)
        kept.append(places[order[places].argsort()[:per_row]])
    return torch.cat(kept).sort().values


def _join(exits: Exits, parts: list[dict[str, Tensor]], costs: Tensor | None, unit: str) -> Trace:
    whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0] if k != "classes"}
    depth = exits.backbone.depth
    depths = (*exits.at, depth)
    return Trace(
        depths=depths,
        stats={k: v for k, v in whole.items() if k not in BESIDE},
        label=whole["label"],
        targets=whole.get("targets"),
        position=whole.get("position"),
        losses=whole.get("losses"),
        logits=whole.get("logits"),
        classes=int(parts[0]["classes"]),
        model_hash=fingerprint(exits),
        costs=costs,
        unit=unit,
    )


def track(items: Iterable[Any], what: str, show: bool, total: int | None = None) -> Iterator[Any]:
    """Yield `items`, with a progress bar when `show`."""
    if not show:
        yield from items
        return
    from rich.progress import track as bar

    yield from bar(items, description=what, total=total)
