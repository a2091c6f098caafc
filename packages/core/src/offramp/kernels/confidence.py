"""Cheap statistics of a head's prediction: what a policy looks at instead of the logits."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

#: statistics computed from the prediction; "cosine" needs two hidden states and is computed by `cosine`
PREDICTION = frozenset({"top1", "margin", "entropy", "sharpened", "energy", "label"})


def confidence(logits: Tensor, needs: Set[str]) -> dict[str, Tensor]:
    """Return the statistics named in `needs` of the softmax over the last dimension.

    logits: [rows, classes], any float dtype. Returns [rows] tensors in float32 (`label`: int64): `label` the argmax,
    `top1` the largest probability, `margin` top-1 minus top-2 probability, `entropy` in nats, `sharpened` the entropy
    in nats of p^2 / sum p^2, `energy` minus the log of the sum of exponentials of the logits. NaN logits give NaN.
    """
    found: dict[str, Tensor] = {}
    if "energy" in needs:
        found["energy"] = -logits.float().logsumexp(-1)
    if not needs & {"top1", "margin", "entropy", "sharpened"}:
        return {**found, "label": logits.argmax(-1)} if "label" in needs else found
    p = logits.float().softmax(-1)
    if "margin" in needs and logits.shape[-1] > 1:
        pair, index = p.topk(2, dim=-1)
        found["margin"], found["top1"], found["label"] = pair[..., 0] - pair[..., 1], pair[..., 0], index[..., 0]
    else:
        found["top1"], found["label"] = p.max(-1)
        if "margin" in needs:
            found["margin"] = found["top1"]
    if "entropy" in needs:
        found["entropy"] = torch.special.entr(p).sum(-1)  # entr(0) = 0: a masked class (-inf) adds nothing
    if "sharpened" in needs:
        found["sharpened"] = torch.special.entr((2 * logits.float()).softmax(-1)).sum(-1)
    return found


def cosine(hidden: Tensor, previous: Tensor) -> Tensor:
    """Return the cosine between two states of the same rows. Both [rows, width]; returns [rows] in float32."""
    return torch.cosine_similarity(hidden.float(), previous.float(), dim=-1)
