"""Sets of labels that hold the right one with a promised probability, whichever exit answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadArgument


@dataclass(frozen=True)
class LabelSets:
    """Keep the classes whose probability at the exit that answered is not below a cut found on calibration rows.

    depths: of every exit and of the full model, in blocks; cuts: for each of them the least probability that keeps a
    class, one number or one per class; 0 keeps all. Paper: Sadinle et al., Least Ambiguous Set-Valued Classifiers
    (2019); one group of rows per exit is a Mondrian conformal predictor (Vovk et al., 2005).
    """

    depths: tuple[int, ...]
    cuts: tuple[float | tuple[float, ...], ...]

    def __post_init__(self) -> None:
        cuts = tuple(tuple(map(float, c)) if isinstance(c, (list, tuple)) else float(c) for c in self.cuts)
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "cuts", cuts)
        if len(self.depths) != len(cuts):
            raise BadArgument(f"{len(cuts)} cuts for {len(self.depths)} depths {list(self.depths)}; give one per depth")

    def of(self, logits: Tensor, depths: Tensor | Sequence[int]) -> Tensor:
        """Return which classes are in the set of each row: bool [rows, classes].

        logits: [rows, classes] of the answers, as the model gave them; depths: [rows] where each row left, as in
        `run.stats.last_depths`. A row that is not finite keeps all classes. Raises `BadArgument` for a depth without
        an exit.
        """
        at = torch.as_tensor(depths)
        if at.shape != logits.shape[:1]:
            raise BadArgument(f"depths has shape {list(at.shape)}, expected one per row of logits {list(logits.shape)}")
        table = torch.zeros(logits.shape, dtype=torch.float32)
        known = torch.zeros(len(at), dtype=torch.bool)
        for depth, cut in zip(self.depths, self.cuts, strict=True):
            here = at.cpu() == depth
            table[here], known = torch.tensor(cut), known | here
        if not bool(known.all()):
            odd = sorted(set(at.cpu()[~known].tolist()))
            raise BadArgument(f"rows left at depths {odd}; these sets were made for exits at {list(self.depths)}")
        p = logits.float().softmax(-1)
        return (p >= table.to(p.device)) | ~p.isfinite()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"depths": list(self.depths), "cuts": [list(c) if isinstance(c, tuple) else c for c in self.cuts]}
