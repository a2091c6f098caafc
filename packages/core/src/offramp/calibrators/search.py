"""Search the shares of rows per exit for the least risk under limits on average cost, largest cost and memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp._registry import register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator, Losses
from offramp.calibrators._quota import Cuts, asked_budget, bisect, fill, geometric, usable
from offramp.calibrators._thresholds import Counts, Sureness, sureness, threshold_at, threshold_policy, with_thresholds
from offramp.errors import BadArgument, OfframpError
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.risks import table
from offramp.trace import Trace

#: rows that a trial is measured on; the best trials are measured on all rows
SAMPLE = 20_000


@register("search")
@dataclass(frozen=True)
class Search(Calibrator):
    """Search one threshold per exit for little risk and little mean cost, and take the least risk within the limits.

    average: most mean cost per row; peak: most cost of any row, in the unit of `trace.costs`; memory: most of `sizes`,
    which says for each column of the trace what a model cut there takes, e.g. its weights in bytes. Rows leave at the
    deepest exit within peak and memory (policy `budgeted`, its `last`). Midway between the first exit and the full
    model on average when no limit is given. trials: of the search, which starts from the shares of method "budget";
    seed: of the search. Needs optuna. Uncertified. Raises `BadArgument` for limits that no exit meets. Paper: DeeR-VLA
    (Yue et al., arXiv 2411.02359), which searches thresholds under such limits by the success of whole tasks.
    """

    takes = ThresholdPolicy
    average: float | None = None
    peak: float | None = None
    memory: float | None = None
    sizes: tuple[float, ...] = ()
    trials: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        for name in ("trials", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name == "trials"):
                raise BadArgument(f"search: {name}={value!r} must be a whole number from {int(name == 'trials')} on")
        if (self.memory is None) != (not self.sizes):
            raise BadArgument(
                "search: memory and sizes go together: memory=2e9, sizes=[...], what a model cut at each exit takes, "
                "and last the full model"
            )

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the policy with one threshold per exit; alpha and delta are not used, risk is what is minimised."""
        score, last = threshold_policy(policy, "search"), self._last(trace)
        nothing = (self.average, self.peak, self.memory) == (None, None, None)
        space = Space.of(trace, score, risk, last)
        columns = usable(space.sure)
        limit = None
        if self.average is not None or nothing:
            limit = asked_budget(trace, self.average, "search", columns)
        part, starts = space.part(SAMPLE, self.seed), list[Counts]()
        if limit is not None:
            starts = [bisect(part.sure, part.costs, limit, lambda t: geometric(np.exp(t), last + 1, columns))[1]]
        front = _search(part, starts, self.trials, self.seed)
        points = [part.at(shares, limit) for shares in front]
        chosen = min(range(len(front)), key=lambda i: (points[i].loss, points[i].cost))
        best = space.at(front[chosen], limit)
        values = [None if c is None else threshold_at(score, c) for c in best.cuts]
        closed = [None] * (len(trace.depths) - 1 - len(values))
        forced = None if last == len(trace.depths) - 1 else last
        made = with_thresholds(trace, score, [*values, *closed], forced)
        note = (
            f"uncertified: {risk} {best.loss:.4g} at mean cost {best.cost:.4g} and at most {space.costs[-1]:.4g} "
            f"{trace.unit} on {len(trace)} rows, the least of {len(front)} best trials of {self.trials}; nothing is "
            f"promised about the risk: for that use method='fixed_sequence' or 'accuracy_gap'"
        )
        return Calibration(made, None, note)

    def _last(self, trace: Trace) -> int:
        """Return the deepest column within peak and memory."""
        costs = np.asarray(trace.costs)
        able = np.ones(len(costs), bool)
        if self.peak is not None:
            able &= costs <= self.peak
        if self.memory is not None:
            if len(self.sizes) != len(costs):
                raise BadArgument(f"search: {len(self.sizes)} sizes for {len(costs)} depths {list(trace.depths)}")
            able &= np.asarray(self.sizes) <= self.memory
        if not able.any():
            raise BadArgument(
                f"search: no exit is within peak={self.peak}, memory={self.memory}; the first costs {costs[0]:g} "
                f"{trace.unit}" + (f" and takes {self.sizes[0]:g}" if self.sizes else "")
            )
        return int(np.nonzero(able)[0][-1])


@dataclass(frozen=True)
class Point:
    """Cuts, and what they cost and risk on average."""

    cuts: Cuts
    cost: float
    loss: float


@dataclass(frozen=True)
class Space:
    """What a trial is measured on: sureness [exits, n], costs and losses [exits + 1, ...] of the columns in reach."""

    sure: Sureness
    costs: Losses
    loss: Losses

    @classmethod
    def of(cls, trace: Trace, policy: ThresholdPolicy, risk: str, last: int) -> Space:
        """Return the columns up to `last`, where all that is left leaves; NaN is the loss of rows without a label."""
        found, mask = table(trace, risk, last + 1)
        loss = np.full((last + 1, len(trace)), np.nan)
        loss[:, mask] = found
        return cls(sureness(trace, policy)[:last], np.asarray(trace.costs)[: last + 1], loss)

    def part(self, rows: int, seed: int) -> Space:
        """Return at most so many rows, drawn at random."""
        n = self.sure.shape[1]
        if n <= rows:
            return self
        pick = np.random.default_rng(seed).choice(n, rows, replace=False)
        return Space(self.sure[:, pick], self.costs, self.loss[:, pick])

    def measure(self, found: tuple[Cuts, Counts]) -> Point:
        """Return what it costs and risks that rows leave at these columns."""
        cuts, columns = found
        loss = self.loss[columns, np.arange(len(columns))]
        return Point(cuts, float(self.costs[columns].mean()), float(np.nanmean(loss)))

    def at(self, shares: Losses, limit: float | None) -> Point:
        """Return the point of these shares, moved as a whole to shallower or deeper exits until the limit is met."""
        if limit is None or not len(self.sure) or limit >= self.costs[-1]:
            return self.measure(fill(self.sure, shares))
        log, steps = np.log(np.maximum(shares, 1e-12)), np.arange(len(shares))

        def moved(t: float) -> Losses:
            power = log + t * steps
            share = np.exp(power - power.max())
            return np.asarray(share / share.sum(), np.float64)

        return self.measure(bisect(self.sure, self.costs, limit, moved))


def _search(space: Space, starts: Sequence[Counts], trials: int, seed: int) -> list[Losses]:
    """Return the shares of the trials that no other beats in both risk and mean cost."""
    size = len(space.sure)
    if not size:
        return [np.ones(1)]
    optuna = _optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)  # it would say a line per trial
    try:
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=16)
        )
        for columns in starts:
            study.enqueue_trial({f"exit{k}": _leaving(columns, k) for k in range(size)})

        def objective(trial: Any) -> tuple[float, float]:
            leaving = [trial.suggest_float(f"exit{k}", 0, 1) for k in range(size)]
            point = space.measure(fill(space.sure, _shares(leaving)))
            return point.loss, point.cost

        study.optimize(objective, n_trials=trials)
        return [_shares([t.params[f"exit{k}"] for k in range(size)]) for t in study.best_trials]
    finally:
        optuna.logging.set_verbosity(before)


def _shares(leaving: Sequence[float]) -> Losses:
    """Return the share of all rows per column, from the share that leaves of those that reach each exit."""
    reach = np.cumprod([1.0, *(1 - u for u in leaving)])
    return np.asarray(np.append(reach[:-1] * np.array(leaving), reach[-1]), np.float64)


def _leaving(columns: Counts, exit: int) -> float:
    """Return which share of the rows that reach an exit leaves there."""
    reached = columns >= exit
    return float((columns[reached] == exit).mean()) if reached.any() else 0.0


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise OfframpError(
            f"method 'search' needs optuna ({error}); run: pip install 'offramp-core[search]', or use method='budget'"
        ) from error
    return optuna
