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
from offramp.errors import BadArgument, DamagedFile
from offramp.policy import ExitPolicy
from offramp.sets import LabelSets as LabelSets

FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """A policy with its thresholds; `certificate` is None when nothing is promised ("uncertified").

    options: how the policy was run when the promise was measured (`kv`, ...); `enable` runs it so unless told not to;
    sets: of labels that hold the right one with a promised probability, of method "conformal_sets" only; model_hash: of
    the model and the heads that it was made on, "" where that is not known.
    """

    policy: ExitPolicy
    certificate: Certificate | None = None
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sets: LabelSets | None = None
    model_hash: str = ""

    def save(self, path: str | Path) -> None:
        """Write one JSON file, atomically."""
        body = {
            "format": FORMAT,
            "policy": self.policy.config(),
            "certificate": None if self.certificate is None else asdict(self.certificate),
            "note": self.note,
            "options": dict(self.options),
            "sets": None if self.sets is None else self.sets.to_dict(),
            "model_hash": self.model_hash,
        }
        write_text(Path(path), json.dumps(body, indent=2))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; raises `DamagedFile` when it is not that."""
        body = read_json(Path(path), FORMAT, ("policy", "certificate"))
        raw = body["certificate"]
        try:
            certificate = None if raw is None else Certificate(**{**raw, "order": _tuples(raw["order"])})
        except (TypeError, KeyError) as error:
            raise DamagedFile(f"{path}: its certificate is not complete ({error})") from error
        raw = body.get("sets")  # files written before there were any have none
        try:
            sets = None if raw is None else LabelSets(**raw)
        except (TypeError, ValueError) as error:
            raise DamagedFile(f"{path}: its sets are not complete ({error})") from error
        options = body.get("options", {})  # files written before there were any have none
        if not isinstance(options, dict):
            raise DamagedFile(f"{path}: options is {options!r}, not a dict")
        made, note = policy_from(body["policy"]), body.get("note", "")
        return cls(made, certificate, note, options, sets, body.get("model_hash", ""))


def promise_on(calibration: Calibration, model_hash: str, force: bool) -> Certificate | None:
    """Return what is still promised on a model with this digest: the certificate, or None with `force` on another one.

    Raises `BadArgument` for another model, other heads or other exits than the calibration was made on, unless
    `force`d.
    """
    certificate = calibration.certificate
    made_on = calibration.model_hash or ("" if certificate is None else certificate.model_hash)
    if made_on in ("", model_hash):
        return certificate
    if not force:
        raise BadArgument(
            f"this calibration was made with other weights (model or heads {made_on}, these are {model_hash}): its "
            f"thresholds mean nothing here and its certificate does not hold. Calibrate on this model: "
            f"offramp.calibrate(offramp.record(model, data), ...); or take it without a certificate: force=True"
        )
    return None


def _tuples(value: Any) -> Any:
    """Return lists as tuples, all the way down."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
