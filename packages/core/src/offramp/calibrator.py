"""The contract of calibration: a trace and a risk bound in, a policy with thresholds and a certificate out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.errors import DamagedFile
from offramp.policy import ExitPolicy

if TYPE_CHECKING:
    from offramp.trace import Trace

FORMAT = 1


@dataclass(frozen=True)
class Certificate:
    """What is promised: with probability 1 - delta over the calibration data, the risk is at most alpha.

    n: calibration rows; p_value: of the last accepted threshold; test: which bound; order: thresholds in the order they
    were tested, fixed before the data was seen; data_hash, model_hash: what the promise was made on.
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


@dataclass(frozen=True)
class Calibration:
    """A policy with its thresholds; `certificate` is None when nothing is promised ("uncertified")."""

    policy: ExitPolicy
    certificate: Certificate | None = None
    note: str = ""

    def save(self, path: str | Path) -> None:
        """Write one JSON file, atomically."""
        from offramp.checkpoint import write_text

        body = {
            "format": FORMAT,
            "policy": self.policy.config(),
            "certificate": None if self.certificate is None else asdict(self.certificate),
            "note": self.note,
        }
        write_text(Path(path), json.dumps(body, indent=2))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; raises `DamagedFile` when it is not that."""
        from offramp._registry import policy_from
        from offramp.checkpoint import read_json

        body = read_json(Path(path), FORMAT, ("policy", "certificate"))
        raw = body["certificate"]
        try:
            certificate = None if raw is None else Certificate(**{**raw, "order": tuple(raw["order"])})
        except (TypeError, KeyError) as error:
            raise DamagedFile(f"{path}: its certificate is not complete ({error})") from error
        return cls(policy_from(body["policy"]), certificate, body.get("note", ""))


class Calibrator(ABC):
    """Turns a trace into a calibrated policy; numpy only, never a model. Subclass, register, one file."""

    @abstractmethod
    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Choose thresholds for `policy` on `trace` so that `risk` <= alpha with confidence 1 - delta."""


Losses = np.ndarray[Any, np.dtype[np.float64]]
