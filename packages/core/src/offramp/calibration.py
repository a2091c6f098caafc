"""What calibration returns: a policy with its thresholds, and what is promised for it; saved as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offramp._registry import policy_from
from offramp.calibrator import Certificate
from offramp.checkpoint import read_json, write_text
from offramp.errors import DamagedFile
from offramp.policy import ExitPolicy

FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """A policy with its thresholds; `certificate` is None when nothing is promised ("uncertified").

    options: how the policy was run when the promise was measured (`kv`, ...); `enable` runs it so unless told not to.
    """

    policy: ExitPolicy
    certificate: Certificate | None = None
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def save(self, path: str | Path) -> None:
        """Write one JSON file, atomically."""
        body = {
            "format": FORMAT,
            "policy": self.policy.config(),
            "certificate": None if self.certificate is None else asdict(self.certificate),
            "note": self.note,
            "options": dict(self.options),
        }
        write_text(Path(path), json.dumps(body, indent=2))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; raises `DamagedFile` when it is not that."""
        body = read_json(Path(path), FORMAT, ("policy", "certificate"))
        raw = body["certificate"]
        try:
            certificate = None if raw is None else Certificate(**{**raw, "order": tuple(raw["order"])})
        except (TypeError, KeyError) as error:
            raise DamagedFile(f"{path}: its certificate is not complete ({error})") from error
        options = body.get("options", {})  # files written before there were any have none
        if not isinstance(options, dict):
            raise DamagedFile(f"{path}: options is {options!r}, not a dict")
        return cls(policy_from(body["policy"]), certificate, body.get("note", ""), options)
