"""What exits and the full model say of states, from recordings where these give the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.head import Around, ExitHead, HeadContext, Rows
from offramp.kernels.confidence import PREDICTION, confidence
from offramp_hf.backbones._calls import FEW, Slots
from offramp_hf.backbones._replay import Example, Function, Replay, weights
from offramp_hf.cache import CHUNK, GrowingLayer


class Answers:
    """Heads with the statistics that are asked of them, and the readout; the last part of `replay` is the readout.

    needs: statistics asked of every look; vocabulary: ids of the classes that exits choose from, None for all.
    """

    def __init__(
        self,
        heads: Sequence[ExitHead],
        context: HeadContext,
        needs: frozenset[str],
        vocabulary: Sequence[int] | None = None,
    ) -> None:
        self.heads, self.context = heads, context
        self.vocabulary: Tensor | None = None
        if vocabulary is not None:
            with torch.inference_mode(False):
                self.vocabulary = torch.tensor(vocabulary, device=weights(_readout(context))[0].device)
        label = set() if vocabulary is None else {"label"}
        self.names = tuple(sorted((needs | label) & PREDICTION))
        self.needs = frozenset(self.names)
        #: what answers at each exit: the heads, or their narrow copies
        self.sayers = list(heads) if (ids := self.vocabulary) is None else [head.narrowed(ids) for head in heads]
        self.narrow = [part for sayer in self.sayers for part in sayer.modules() if isinstance(part, Rows)]
        projection = context.projection
        self.replay = Replay([*(nn.ModuleList([head, projection]) for head in self.sayers), _readout(context)])
        self.mixing = Replay(heads)
        self.masks: dict[int, Tensor] = {}

    def begin(self) -> None:
        """A generation begins."""
        for rows in self.narrow:
            rows.refresh()
        self.replay.begin()
        self.mixing.begin()
        self.masks = {}

    def look(self, level: int, state: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (logits, statistics [rows] by name) of an exit for states [rows, width]; logits: of the classes that
        it chooses from, see `spread`."""
        head, names, needs, vocabulary = self.sayers[level], self.names, self.needs, self.vocabulary

        def answer(state: Tensor) -> tuple[Tensor, ...]:
            logits = head(state)
            stats = confidence(logits, needs)
            if vocabulary is not None:
                stats["label"] = vocabulary[stats["label"]]
            return logits, *(stats[name] for name in names)

        logits, *stats = _run(self.replay, level, answer, state, (state.shape, "look"))
        return logits, dict(zip(names, stats, strict=False))

    def predict(self, level: int, state: Tensor) -> Tensor:
        """Return the logits [..., classes] of an exit for states [..., width]."""
        return self.spread(_run(self.replay, level, self.sayers[level], state, (state.shape, "predict")))

    def spread(self, logits: Tensor) -> Tensor:
        """Return logits [..., classes] of what an exit says: classes that it does not choose from are impossible."""
        ids = self.vocabulary
        if ids is None:
            return logits
        # the least number, not -inf: evidence that is not finite stops no row
        least = torch.finfo(logits.dtype).min
        return logits.new_full((*logits.shape[:-1], self.context.classes), least).index_copy_(-1, ids, logits)

    def readout(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [..., classes], their largest [...]) of the full model for its last states [..., width]."""
        context = self.context

        def answer(state: Tensor) -> tuple[Tensor, Tensor]:
            logits = context.readout(state)
            return logits, logits.argmax(-1)

        logits, best = _run(self.replay, len(self.heads), answer, state, (state.shape, "readout"))
        return logits, best

    def mix(self, level: int, hidden: Tensor, around: Around, layer: GrowingLayer) -> Tensor:
        """Let a head that reads earlier states take in new ones [batch, new, width]; `layer` is its `around.past`."""
        head, new = self.heads[level], hidden.shape[1]
        if around.mask is not None or new > FEW or not layer.is_initialized or layer.length <= 2 * new:
            return head.mix(hidden, around)
        masks = [self.seen(new, layer.length + new, hidden.device)] if new > 1 else []
        shape = hidden.shape, around.positions.shape
        step = self.mixing.ready(shape)[level] or self.mixing.find(level, shape)
        if step is not None:
            out: Tensor = step[0](hidden, around.positions, *layer.room(new), *masks, *step[1])
            return out
        mixed = head.mix(hidden, around)

        def function(hidden: Tensor, positions: Tensor, keys: Tensor, values: Tensor, *mask: Tensor) -> Tensor:
            return head.mix(hidden, Around(positions, mask[0] if mask else None, Slots(keys, values, new)))

        inputs = hidden, around.positions, layer.keys, layer.values, *masks
        shorter = hidden, around.positions, layer.keys[:, :, 1:], layer.values[:, :, 1:], *(m[..., 1:] for m in masks)
        self.mixing.learn(level, shape, mixed, lambda: Example(function, inputs, shorter, new == 1))
        return mixed

    def seen(self, new: int, slots: int, device: torch.device) -> Tensor:
        """Return which slots each of `new` states at their end sees, bool [1, new, slots], a view of one matrix."""
        found = self.masks.get(new)
        if found is None or found.shape[-1] < slots:
            wide = slots + CHUNK
            found = self.masks[new] = torch.ones(1, new, wide, dtype=torch.bool, device=device).tril(wide - new)
        return found[..., found.shape[-1] - slots :]


def _readout(context: HeadContext) -> nn.ModuleList:
    return nn.ModuleList([context.norm, context.projection])


def _run(replay: Replay, index: int, function: Callable[[Tensor], Any], state: Tensor, shape: Any) -> Any:
    step = replay.ready(shape)[index] or replay.find(index, shape)
    if step is not None:
        return step[0](state, *step[1])
    out: Any = function(state)
    call: Function = function
    replay.learn(index, shape, out, lambda: Example(call, [state], [state], shape[1]))
    return out
