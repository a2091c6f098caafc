"""Models in a row instead of exits in one model: the next one sees only the rows that the policy lets go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.calibration import Calibration, promise_on
from offramp.calibrator import Certificate
from offramp.costs import Meter, spent
from offramp.enable import Stats, make_policy
from offramp.engine import LOGITS, decide
from offramp.errors import BadArgument
from offramp.kernels.compact import compact
from offramp.kernels.confidence import confidence
from offramp.loss import row_losses
from offramp.policy import Evidence, ExitPolicy, SchedulePolicy
from offramp.record import STATISTICS, digest, evaluating, track
from offramp.trace import Trace

COMBINE = ("last", "average")
LABELS = ("labels", "y")


def cascade(
    models: Sequence[nn.Module],
    policy: str | ExitPolicy | Calibration | Mapping[str, Any] = "never",
    *,
    combine: str = "last",
    force: bool = False,
    **options: Any,
) -> Cascade:
    """Put classifiers in a row, cheapest first; called as one model, it answers each row by as few as the policy wants.

    models: two or more, each called with the same arguments, which return logits [rows, classes] or an object that has
    them under `logits`; policy: as for `enable`, over predictions ("window", "confidence", ...), "never" runs all;
    combine: "last" answers as the last model asked, "average" with the log of the mean of the probabilities so far;
    force: take a calibration made on other models, without its certificate. Raises `BadArgument`, `UnknownName`.
    """
    found = Cascade(models, combine)
    found.use(policy, force=force, **options)
    return found


class Cascade(nn.Module):
    """Models in a row, each for the rows that are left; `stats` counts rows, a "block" being one call of one model."""

    def __init__(self, models: Sequence[nn.Module], combine: str = "last") -> None:
        super().__init__()
        if not isinstance(models, (list, tuple, nn.ModuleList)) or len(models) < 2:
            raise BadArgument(f"a cascade is of two models or more, cheapest first: [small, large]; not {models!r}")
        if odd := [type(m).__name__ for m in models if not isinstance(m, nn.Module)]:
            raise BadArgument(f"a cascade is of torch modules, not {', '.join(odd)}")
        if combine not in COMBINE:
            raise BadArgument(f"combine={combine!r} is not known; choose one of {', '.join(COMBINE)}")
        self.models, self.combine, self.stats = nn.ModuleList(models), combine, Stats()
        self.depths = tuple(range(1, len(models) + 1))
        self.policy: ExitPolicy
        self.certificate: Certificate | None = None

    def use(
        self, policy: str | ExitPolicy | Calibration | Mapping[str, Any], *, force: bool = False, **options: Any
    ) -> Cascade:
        """Set the policy from now on, as `cascade` takes it, and count anew; returns the cascade."""
        made = make_policy(policy, self.depths[:-1], **options)
        odd = made.statistics() - LOGITS
        if odd or isinstance(made, SchedulePolicy):
            raise BadArgument(
                f"{type(made).__name__} looks at {', '.join(sorted(odd)) or 'positions'}, and a cascade has only the "
                f"predictions of its models; use a policy over those, e.g. window, confidence, margin or entropy"
            )
        promised = promise_on(policy, self.fingerprint(), force) if isinstance(policy, Calibration) else None
        self.policy, self.certificate, self.stats = made, promised, Stats()
        return self

    def fingerprint(self) -> str:
        """Return a digest of all the models, as a trace and a certificate of this cascade hold it."""
        return digest(f"cascade {self.combine} {[type(m).__name__ for m in self.models]}", self.models)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the models in turn, each on the rows that are left; returns what the first returns, with all answers.

        Of an object with `logits`, nothing else is kept: other fields would be of the first model only.
        """
        output = self.models[0](*args, **kwargs)
        answer = found = logits_of(output)
        batch, last = len(found), len(self.models) - 1
        rows = torch.arange(batch, device=found.device)
        depths = torch.ones_like(rows)
        state, run = self.policy.start(batch, found.device), batch
        for index in range(last):
            seen = self._look(index, found)
            stop, state, finite = decide(self.policy, state, seen)
            left, broken = torch.stack([(~stop).sum(), (~finite).sum()]).tolist()  # the host sync of a model
            self.stats.nonfinite += broken
            if not left:
                break
            _, rows, before, *rest = compact(~stop, rows, found, *state.values(), count=left)
            state = dict(zip(state, rest, strict=True))
            more = logits_of(self.models[index + 1](*_rows(args, rows, batch), **_rows(kwargs, rows, batch)))
            found = self._combined(before, more, index + 1)
            answer = answer.to(torch.promote_types(answer.dtype, found.dtype))
            answer = answer.index_copy(0, rows, found.to(answer))
            depths[rows], run = index + 2, run + len(rows)
        self.stats.blocks_run += run
        self.stats.blocks_full += batch * len(self.models)
        self.stats.last_depths = depths = depths.cpu()
        self.stats.count(depths)
        return answer if isinstance(output, Tensor) else type(output)(logits=answer)

    def _look(self, index: int, logits: Tensor) -> Evidence:
        stats = confidence(logits, self.policy.statistics() | {"top1"})
        last = index == len(self.models) - 2
        return Evidence(index, index + 1, index == 0, last, None, logits, logits.shape[-1], None, stats)

    def _combined(self, before: Tensor, more: Tensor, count: int) -> Tensor:
        """Return the answer after `count` + 1 models from that of the first `count` and the logits of the next."""
        if before.shape != more.shape:
            raise BadArgument(
                f"the models of a cascade give predictions {list(before.shape)} and {list(more.shape)} for the same "
                f"rows; they must share rows and classes"
            )
        if self.combine == "last":
            return more
        mean = (count * before.double().softmax(-1) + more.double().softmax(-1)) / (count + 1)
        return mean.log().to(more.dtype)

    @torch.no_grad()
    def record(self, data: Iterable[Any], *, logits: bool, costs: str, progress: bool) -> Trace:
        """Run every model on every row of batches and keep what each said: one column per model; for `offramp.record`.

        A batch is a tensor, a pair (inputs, labels), or a mapping of arguments, with labels under "labels" or "y".
        """
        parts: list[dict[str, Tensor]] = []
        price: Tensor | None = None
        with evaluating(self):
            for batch in track(data, "record", progress):
                args, kwargs, targets = _split(batch)
                price = self._costs(args, kwargs, costs) if price is None else price
                answers = [logits_of(self.models[0](*args, **kwargs))]
                for count, model in enumerate(self.models[1:], start=1):
                    answers.append(self._combined(answers[-1], logits_of(model(*args, **kwargs)), count))
                parts.append(_one(answers, targets))
        if not parts or not sum(len(p["label"]) for p in parts):
            raise BadArgument("the data holds no rows; give at least one batch")
        whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        return Trace(
            self.depths,
            {k: whole[k] for k in sorted(STATISTICS - {"label"})},
            label=whole["label"],
            classes=whole["logits"].shape[-1],
            costs=price,
            targets=whole.get("targets"),
            losses=whole.get("losses"),
            logits=whole["logits"] if logits else None,
            model_hash=self.fingerprint(),
            unit=costs,
        )

    def _costs(self, args: Any, kwargs: Any, unit: str) -> Tensor:
        """Return the cumulative cost [models] per row; a model is one block."""
        if unit == "blocks":
            return torch.arange(1.0, len(self.models) + 1)

        def forward(meter: Meter) -> list[float]:
            found = []
            for model in self.models:
                rows = len(logits_of(model(*args, **kwargs)))
                found.append(meter.read() / rows)
            return found

        return torch.tensor(spent(forward, unit), dtype=torch.float64)


def logits_of(output: Any) -> Tensor:
    """Return the logits [rows, classes] of what a model returned; raises `BadArgument` for anything else."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 2:
        shape = list(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise BadArgument(
            f"a model of a cascade must return logits [rows, classes], or an object with them as `logits`, not {shape}"
        )
    return found


def _rows(given: Any, rows: Tensor, batch: int) -> Any:
    """Return arguments with every tensor cut to some rows whose dimension 0 is the batch."""

    def cut(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
        return value[rows.to(value.device)] if whole else value

    return {k: cut(v) for k, v in given.items()} if isinstance(given, Mapping) else [cut(v) for v in given]


def _split(batch: Any) -> tuple[list[Any], dict[str, Any], Tensor | None]:
    """Return (arguments, keyword arguments, labels or None) of a batch."""
    if isinstance(batch, Mapping):
        labels = next((batch[k] for k in LABELS if k in batch), None)
        return [], {k: v for k, v in batch.items() if k not in LABELS}, labels
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return [batch[0]], {}, batch[1]
    return [batch], {}, None


def _one(answers: Sequence[Tensor], targets: Tensor | None) -> dict[str, Tensor]:
    """Return what a trace keeps of one batch, on the CPU."""
    columns = [confidence(a, STATISTICS) for a in answers]
    one = {k: torch.stack([c[k] for c in columns], 1).cpu() for k in columns[0]}
    one["logits"] = torch.stack(list(answers), 1).float().cpu()
    if targets is not None:
        one["targets"] = targets = targets.cpu()
        one["losses"] = torch.stack([row_losses(a, targets.to(a.device)) for a in answers], 1).cpu()
    return one
