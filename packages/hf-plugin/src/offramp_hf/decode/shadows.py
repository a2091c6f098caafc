"""What every exit would have said at places that were run anyway: shadow tokens, in as few projections as possible."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offramp.draft import Shadow
from offramp.kernels.confidence import confidence
from offramp_hf.decode.answers import Answers


def shadow_rows(answers: Answers, states: Mapping[int, Tensor]) -> dict[int, list[Shadow]]:
    """Return by row the shadow tokens of every exit. states: [batch, places, width] by level.

    Heads on the shared unembedding are projected together, so that its weights are read once. Heads that read earlier
    states are left out: their shadows would need memories of their own.
    """
    heads, ids = answers.sayers, answers.vocabulary
    plain = [level for level in states if not type(heads[level]).mixes]
    features = {level: heads[level].features(states[level]) for level in plain}
    shared = [level for level in plain if features[level] is not None]
    logits: dict[int, Tensor] = {}
    if shared:
        together = torch.stack([f for level in shared if (f := features[level]) is not None])
        logits = dict(zip(shared, heads[shared[0]].unembed(together).unbind(0), strict=True))
    for level in plain:
        if level not in logits:
            logits[level] = heads[level](states[level])
    found: dict[int, list[Shadow]] = {}
    for level, answer in logits.items():
        stats = confidence(answer, frozenset({"top1", "label"}))
        labels = stats["label"] if ids is None else ids[stats["label"]]
        for row, (tokens, sure) in enumerate(zip(labels.tolist(), stats["top1"].tolist(), strict=True)):
            found.setdefault(row, []).append(Shadow(level, tokens, sure))
    return found
