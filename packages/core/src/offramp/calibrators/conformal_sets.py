"""Sets of labels instead of single ones, with a promise for each exit, and if asked for each class, on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from offramp._registry import register
from offramp.calibration import Calibration, LabelSets
from offramp.calibrator import Calibrator, Certificate, Losses
from offramp.calibrators._thresholds import Counts
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy
from offramp.pvalues import binomial_p, certain_rank, expected_rank, rows_needed
from offramp.simulate import exit_columns
from offramp.trace import UNLABELLED, Trace


@register("conformal_sets")
@dataclass(frozen=True)
class ConformalSets(Calibrator):
    """Keep the policy as it is, and find for every exit the cut above which classes are in the set of a row.

    The right label is outside the sets of at most alpha of the rows that leave at an exit: for all exits at once with
    confidence 1 - delta; with average=True on average over calibration data, which gives smaller sets and no
    certificate. by_class: the same for every class on its own. The policy must come from other rows than these. The
    sets are in `Calibration.sets`; a group of fewer rows than its promise needs gets all classes, and the note says so.
    Needs labels, and logits or task losses (cross-entropy). Raises `BadArgument`. Papers: Least Ambiguous Set-Valued
    Classifiers (Sadinle et al., 2019), conformal sets on exits (Regol et al., arXiv 2310.09163).
    """

    risk: ClassVar[str] = "miscoverage"
    own_risk: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    average: bool = False
    by_class: bool = False

    def __post_init__(self) -> None:
        for name in ("average", "by_class"):
            if not isinstance(getattr(self, name), bool):
                raise BadArgument(f"conformal_sets: {name} must be True or False, not {getattr(self, name)!r}")

    def fit(self, trace: Trace, policy: ExitPolicy, *, alpha: float, delta: float, risk: str) -> Calibration:
        """Return the policy with the sets of its exits; risk is always miscoverage."""
        targets, columns = _targets(trace), exit_columns(trace, policy).numpy()
        right = right_probability(trace, columns, targets)
        groups, size = columns, len(trace.depths)
        if self.by_class:
            groups, size = columns * trace.classes + targets, size * trace.classes
        groups = np.where(targets == UNLABELLED, -1, groups)
        reached = np.unique(groups[groups >= 0])
        level = delta / max(1, len(reached))  # all groups at once
        cuts, p, short = np.zeros(size), 0.0, list[str]()
        for group in reached:
            scores = np.sort(right[groups == group])[::-1]  # from the surest of the right label on
            n = len(scores)
            rank = expected_rank(n, alpha) if self.average else certain_rank(n, alpha, level)
            if rank > n:
                short.append(self._name(trace, int(group), n))
                continue
            cuts[group] = scores[rank - 1]
            p = max(p, binomial_p(int((scores < cuts[group]).sum()), n, alpha))
        shape: Any = cuts.reshape(len(trace.depths), -1).tolist() if self.by_class else cuts.tolist()
        sets = LabelSets(trace.depths, tuple(shape))
        vacuous = len(short) == len(reached)
        note = _note(short, alpha, level, self.average)
        if self.average or vacuous:
            note = note if self.average else f"uncertified: {note}"
            return Calibration(policy, None, note, sets=sets)
        certificate = Certificate(
            risk="miscoverage",
            alpha=float(alpha),
            delta=float(delta),
            n=int((groups >= 0).sum()),
            p_value=p,
            test="binomial by exit and class" if self.by_class else "binomial by exit",
            order=trace.depths,
            data_hash=trace.data_hash,
            model_hash=trace.model_hash,
        )
        return Calibration(policy, certificate, note, sets=sets)

    def _name(self, trace: Trace, group: int, n: int) -> str:
        column, label = divmod(group, trace.classes) if self.by_class else (group, None)
        where = f"depth {trace.depths[column]}" + ("" if label is None else f" class {label}")
        return f"{where} ({n} rows)"


def right_probability(trace: Trace, columns: Counts, targets: Counts) -> Losses:
    """Return the probability [N] of the right label where each row leaves; 1 where it is not known."""
    at = torch.from_numpy(columns)
    if trace.logits is not None:
        own = trace.logits[torch.arange(len(trace)), at].float().softmax(-1)
        p = own.gather(1, torch.from_numpy(targets).clamp(min=0)[:, None]).squeeze(1)
    elif trace.losses is not None:
        p = (-trace.losses.gather(1, at[:, None]).squeeze(1).float()).exp()
    else:
        raise BadArgument(
            "conformal_sets needs the probability of the right label, from logits or task losses, and the trace has "
            "neither; record labelled data: offramp.record(model, data, logits=True)"
        )
    found: Losses = p.nan_to_num(nan=1.0).double().numpy()  # a row of NaN keeps every class
    return found


def _targets(trace: Trace) -> Counts:
    if trace.targets is None or trace.labelled is None:
        raise BadArgument("conformal_sets needs the right labels, and the trace has none; record data with its labels")
    found: Counts = trace.targets.long().numpy()
    return found


def _note(short: list[str], alpha: float, level: float, average: bool) -> str:
    said = "uncertified: coverage holds on average over calibration data" if average else ""
    if short:
        least = int(np.ceil((1 - alpha) / alpha - 1e-9)) if average else rows_needed(alpha, level)
        said += (
            f"{'; ' if said else ''}too few rows for anything but all classes at {', '.join(short[:5])}"
            f"{' ...' if len(short) > 5 else ''}; {least} are needed for each"
        )
    return said
