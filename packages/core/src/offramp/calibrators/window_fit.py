"""Place a window around the score at which a selective task accepts or rejects an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp._registry import create, register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator, Losses
from offramp.calibrators._thresholds import Sureness, sureness, threshold_policy
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.simulate import simulate
from offramp.trace import Trace

TASKS = ("selective", "ood", "both")
#: ranked rows before which a share of errors says nothing, and the share of all rows where they are fewer than that
FIRST, SHARE = 500, 0.1


@register("window_fit")
@dataclass(frozen=True)
class WindowFit(Calibrator):
    """Let go on, at each exit, the rows within `width` of the operating point, counted in shares of the ranked rows.

    task: "selective" (reject wrong answers), "ood" (reject rows from elsewhere) or "both". The operating point is that
    of the exit by itself, one of: coverage, the share of rows accepted (0.8 when nothing is given); error, the largest
    share of wrong ones among the accepted; tpr, the share of rows from here that are accepted (the same as coverage,
    for "ood"). Rows without a label are from elsewhere: "ood" and "selective" place the point without them, "both"
    counts them as errors. width: share of the rows on either side; mixed: rank among all rows of the trace in place of
    the labelled ones, when the traffic is as mixed as the trace. A trace without labels is all from here, and wrong is
    what differs from the full model. Uncertified. Raises `BadArgument`. Paper: Xia & Bouganis, ICCV 2023.
    """

    takes = ThresholdPolicy
    task: str = "selective"
    coverage: float | None = None
    error: float | None = None
    tpr: float | None = None
    width: float = 0.1
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise BadArgument(f"window_fit: task={self.task!r} is not known; choose one of {', '.join(TASKS)}")
        given = {n: getattr(self, n) for n in ("coverage", "error", "tpr") if getattr(self, n) is not None}
        if len(given) > 1 or (self.task == "ood" and self.error is not None):
            raise BadArgument(
                f"window_fit: a window belongs to one operating point, and {', '.join(given)} was given; give one of "
                f"coverage=0.8, error=0.05 (not for task ood) or tpr=0.95"
            )
        for name, value in {**given, "width": self.width}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise BadArgument(f"window_fit: {name}={value!r} must be a share between 0 and 1, both excluded")
        if not isinstance(self.mixed, bool):
            raise BadArgument(f"window_fit: mixed must be True or False, not {self.mixed!r}")

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return `window` around the policy's own score; alpha, delta and risk are not used."""
        score = threshold_policy(policy, "window_fit")
        here, known = _here(trace), _answers(trace)
        ranked = here if self.task != "both" else np.ones(len(trace), bool)
        up, low, high, points = type(score).safer == "up", list[float](), list[float](), list[float]()
        for column, row in enumerate(sureness(trace, score)):
            if not np.isfinite(row).any():  # as cosines at the first exit: nothing leaves there
                low.append(0.0)
                high.append(0.0)
                continue
            wrong = (trace.label[:, column].numpy() != known) | ~here
            point = self._point(row[ranked], wrong[ranked])
            among = row if self.mixed else row[ranked]
            at = float((among < point).mean())
            ends = np.clip([at - self.width, at + self.width], 0.0, 1.0)
            w0, w1 = (float(w) for w in np.quantile(among, ends, method="nearest"))
            low.append(w0 if up else -w1)
            high.append(w1 if up else -w0)
            points.append(point if up else -point)
        made: Any = create(ExitPolicy, "window", inner=score, low=tuple(low), high=tuple(high))
        return Calibration(made, None, self._note(trace, made, points))

    def _point(self, row: Sureness, wrong: Losses) -> float:
        """Return the sureness from which on answers are accepted."""
        if self.error is None:
            share = self.coverage or self.tpr or 0.8
            return float(np.quantile(row, 1 - share, method="nearest"))
        order = np.argsort(-row, kind="stable")
        rates = np.cumsum(wrong[order]) / np.arange(1, len(row) + 1)
        first = min(FIRST, int(SHARE * len(row)))
        able = np.nonzero(rates[first:] <= self.error)[0]
        if not len(able):
            raise BadArgument(
                f"window_fit: error={self.error} is met by no share of the rows from {first + 1} rows on; the least is "
                f"{rates[first:].min():.4g}. Ask for that much, or for a coverage"
            )
        return float(row[order[first + able[-1]]])

    def _note(self, trace: Trace, made: ExitPolicy, points: list[float]) -> str:
        out = simulate(trace, made)
        inside = float((out.columns > 0).double().mean())
        said = ", ".join(f"{p:.4g}" for p in points)
        return (
            f"uncertified: {self.task} windows around the operating points {said} (accept on the sure side); "
            f"{inside:.1%} of {len(trace)} rows go on past the first exit, mean cost {out.cost_mean:.4g} {trace.unit}; "
            f"certify the width with method='fixed_sequence' on a trace of other rows"
        )


def _here(trace: Trace) -> Any:
    """Return the mask [N] of rows with a label; all of them where the trace has none."""
    known = trace.labelled
    return np.ones(len(trace), bool) if known is None else known.numpy()


def _answers(trace: Trace) -> Any:
    """Return the right answers [N]: labels, or the full model's where the trace has none."""
    return (trace.label[:, -1] if trace.labelled is None or trace.targets is None else trace.targets).numpy()
