"""What a trace says about each exit: how right it is, whether its scores know when, and how exits differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.calibrator import Losses
from offramp.trace import Trace

#: bins of the calibration error: 15 is what papers report since Guo et al. (ICML 2017)
BINS = 15
#: statistics that fall as an exit grows surer
FALLING = frozenset({"entropy", "sharpened", "energy"})


def exit_scores(trace: Trace) -> list[dict[str, Any]]:
    """Return one dict per exit and one for the full model: depth, cost, agreement, accuracy, ece, auroc.

    accuracy: None without labels; ece: expected calibration error of top-1 probability, for the labels, or for
    agreement where there are none; auroc: by statistic, of telling the rows on which the exit agrees with the full
    model from the others (0.5 says nothing, 1 says all), None where all rows agree or none do.
    """
    known = trace.labelled
    out = []
    for k, depth in enumerate(trace.depths):
        same = trace.label[:, k] == trace.label[:, -1]
        right = None if known is None or trace.targets is None else (trace.label[:, k] == trace.targets)[known]
        truth = same if right is None else right
        top1 = trace.stats.get("top1")
        sure = None if top1 is None else (top1[:, k] if right is None else top1[:, k][known])
        last = k == len(trace.depths) - 1
        out.append(
            {
                "depth": depth,
                "cost": float(torch.as_tensor(trace.costs)[k]),
                "agreement": float(same.double().mean()),
                "accuracy": None if right is None else float(right.double().mean()),
                "ece": None if sure is None else calibration_error(sure, truth),
                "auroc": {} if last else {name: _auroc(name, v[:, k], same) for name, v in trace.stats.items()},
            }
        )
    return out


def confusion(trace: Trace) -> dict[str, Any]:
    """Return how exits differ: depths, `same` (share of rows on which exits i and j give one answer, [K][K]) and, with
    labels, `outcomes` per exit against the full model: both right, only the exit, only the full model, neither.
    """
    label = trace.label
    count = len(trace.depths)
    same = [[float((label[:, i] == label[:, j]).double().mean()) for j in range(count)] for i in range(count)]
    body: dict[str, Any] = {"depths": list(trace.depths), "same": same}
    known = trace.labelled
    if known is None or trace.targets is None:
        return body
    right = (label == trace.targets[:, None])[known]
    full = right[:, -1]
    body["outcomes"] = [
        {
            "depth": depth,
            "both": float((right[:, k] & full).double().mean()),
            "only_exit": float((right[:, k] & ~full).double().mean()),
            "only_full": float((~right[:, k] & full).double().mean()),
            "neither": float((~right[:, k] & ~full).double().mean()),
        }
        for k, depth in enumerate(trace.depths[:-1])
    ]
    return body


def auroc(score: Tensor, positive: Tensor) -> float | None:
    """Return the chance that a positive row scores above a negative one, ties counted half; None without either.

    score, positive: [rows]; rows whose score is not finite are left out.
    """
    from scipy.stats import rankdata

    keep = score.isfinite()
    values, yes = score[keep].double().numpy(), positive[keep].numpy().astype(bool)
    n, m = int(yes.sum()), int((~yes).sum())
    if not n or not m:
        return None
    ranks = rankdata(values)
    return float((ranks[yes].sum() - n * (n + 1) / 2) / (n * m))


def calibration_error(probability: Tensor, right: Tensor, bins: int = BINS) -> float | None:
    """Return the expected calibration error, in equal-width bins of the probability [rows]; None without finite rows.

    Paper: Guo et al., On Calibration of Modern Neural Networks (ICML 2017).
    """
    keep = probability.isfinite()
    p: Losses = probability[keep].double().numpy()
    hit: Losses = right[keep].double().numpy()
    if not len(p):
        return None
    place = np.minimum((p * bins).astype(int), bins - 1)
    gap = np.bincount(place, hit - p, minlength=bins)
    return float(np.abs(gap).sum() / len(p))


def _auroc(name: str, score: Tensor, same: Tensor) -> float | None:
    return auroc(-score.double() if name in FALLING else score, same)
