"""Temperature scaling: make the probabilities of each exit mean what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp._registry import create, register
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator, Losses
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy
from offramp.trace import UNLABELLED, Trace

#: temperatures searched; outside it an exit is useless (flat) or already certain of everything
LOWEST, HIGHEST = 0.02, 50.0
#: rows that one exit is fitted on, drawn evenly from all: one number is known to under 1 % from so many, and a million
#: rows of twelve exits would take minutes
MOST = 20_000
TO = ("full", "targets")


@register("temperature")
@dataclass(frozen=True)
class Temperature(Calibrator):
    """Fit one temperature per exit by least negative log-likelihood, and wrap the policy in `tempered`.

    to: "full" (the full model's answers) or "targets" (true labels). Promises nothing, so the calibration is
    uncertified: pass its policy to `fixed_sequence` on other rows for that. Needs a trace with logits. Raises
    `BadArgument`. Paper: Guo et al., On Calibration of Modern Neural Networks (ICML 2017).
    """

    to: str = "full"

    def __post_init__(self) -> None:
        if self.to not in TO:
            raise BadArgument(f'temperature: to must be "full" or "targets", not {self.to!r}')

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the policy at the fitted temperatures; alpha, delta and risk are not used."""
        if trace.logits is None:
            raise BadArgument(
                'method "temperature" needs the logits, and this trace keeps none; '
                "record it with offramp.record(model, data, logits=True)"
            )
        if self.to == "targets" and trace.targets is None:
            raise BadArgument('temperature: to="targets" needs labels, and the trace has none; use to="full"')
        answers = trace.targets if self.to == "targets" and trace.targets is not None else trace.label[:, -1]
        every = math.ceil(len(trace) / MOST)
        truth = answers[::every].numpy()
        fitted = tuple(
            best_temperature(trace.logits[::every, k].double().numpy(), truth) for k in range(len(trace.depths) - 1)
        )
        tempered = create(ExitPolicy, "tempered", inner=policy, temperature=fitted)
        note = (
            f"uncertified: temperatures fitted to the {'labels' if self.to == 'targets' else 'full model'} on "
            f"{len(trace)} rows; certify with method='fixed_sequence' on a trace of other rows"
        )
        return Calibration(tempered, None, note)


def best_temperature(logits: Losses, truth: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Return the temperature in [0.02, 50] with the least mean negative log-likelihood of `truth` [n], logits [n, C].

    Rows that are not finite or have no label are left out; without any row the temperature is 1.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    keep = np.isfinite(logits).all(-1) & (truth != UNLABELLED)
    if not keep.any():
        return 1.0
    z, own = logits[keep], np.take_along_axis(logits[keep], truth[keep][:, None], -1)[:, 0]

    def nll(log_t: float) -> float:
        return float(np.mean(logsumexp(z / math.exp(log_t), axis=-1) - own / math.exp(log_t)))

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))
