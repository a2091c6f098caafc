"""The contract of calibration: a trace and a risk bound in, a policy with thresholds and a certificate out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from offramp.policy import ExitPolicy

if TYPE_CHECKING:
    from offramp.calibration import Calibration
    from offramp.trace import Trace


@dataclass(frozen=True)
class Certificate:
    """What is promised: with probability 1 - delta over the calibration data, the risk is at most alpha.

    n: calibration rows that were tested; p_value: of the last accepted threshold, or the largest where several tests
    must all pass; test: which bound; order: thresholds in the order they were tested, fixed before the data was seen;
    data_hash, model_hash: what the promise was made on.
    """

    risk: str
    alpha: float
    delta: float
    n: int
    p_value: float
    test: str
    order: tuple[Any, ...]
    data_hash: str
    model_hash: str


class Calibrator(ABC):
    """Turns a trace into a calibrated policy; numpy only, never a model. Subclass, register, one file."""

    #: the policies it can set
    takes: ClassVar[type[Any]] = ExitPolicy
    #: the risk that is bounded when none is asked for
    risk: ClassVar[str] = "disagreement"
    #: whether that is the only one it can bound
    own_risk: ClassVar[bool] = False
    #: whether it leaves the policy as it is, so that a name needs its threshold
    keeps: ClassVar[bool] = False

    @abstractmethod
    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Choose thresholds for `policy` on `trace` so that `risk` <= alpha with confidence 1 - delta."""


Losses = np.ndarray[Any, np.dtype[np.float64]]
