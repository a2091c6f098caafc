"""What exits and the full model say of states, from recordings where these give the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.head import Around, ExitHead, HeadContext, Rows
from offramp.kernels.confidence import PREDICTION, confidence
from offramp.kernels.head_stats import NAMED, head_stats, parts
from offramp_hf.backbones._calls import FEW, Slots
from offramp_hf.backbones._finish import Finish
from offramp_hf.backbones._replay import Example, Function, Replay, hooked, weights
from offramp_hf.cache import CHUNK, GrowingLayer

#: classes from which on statistics are made without the logits: 32,000 in bfloat16 take 0.8 of the time (5.6 and 7.2
#: ms), few take longer
MANY = 16384


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
        self.names = tuple(sorted(needs & PREDICTION))
        self.needs = frozenset(self.names)
        #: what answers at each exit: the heads, or their narrow copies
        self.sayers = list(heads) if (ids := self.vocabulary) is None else [head.narrowed(ids) for head in heads]
        #: how many classes they choose from
        self.classes = context.classes if vocabulary is None else len(vocabulary)
        self.narrow = [part for sayer in self.sayers for part in sayer.modules() if isinstance(part, Rows)]
        projection = context.projection
        self.replay = Replay([*(nn.ModuleList([head, projection]) for head in self.sayers), _readout(context)])
        self.mixing = Replay(heads)
        self.masks: dict[int, Tensor] = {}

    def begin(self, compiled: bool = False) -> None:
        """A generation begins; compiled: as in `Replay.begin`."""
        for rows in self.narrow:
            rows.refresh()
        some = self.classes >= MANY and self.needs <= NAMED
        #: whether statistics can be made without the logits, by exit
        self.plain = [some and _matrix(head) is not None for head in self.sayers]
        self.replay.begin(compiled)
        self.mixing.begin(compiled)
        self.masks = {}

    @property
    def learned(self) -> int:
        """Return in how many calls recordings were made or compared."""
        return self.replay.learned + self.mixing.learned

    def look(self, level: int, state: Tensor, lazy: bool = False) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return (logits, statistics [rows] by name) of an exit for states [rows, width]; logits: of the classes that
        it chooses from, see `spread`. lazy: None will do for them."""
        head, names, needs, vocabulary = self.sayers[level], self.names, self.needs, self.vocabulary
        lazy = lazy and self.plain[level]

        def answer(state: Tensor) -> tuple[Tensor, ...]:
            if lazy:
                stats = _statistics(head, state, needs)
            else:
                logits = head(state)
                stats = confidence(logits, needs)
            if vocabulary is not None:
                stats["label"] = vocabulary[stats["label"]]
            return (*([] if lazy else [logits]), *(stats[name] for name in names))

        found = _run(self.replay, level, answer, state, (state.shape, "lazy look" if lazy else "look"))
        logits, stats = (None, found) if lazy else (found[0], found[1:])
        return logits, dict(zip(names, stats, strict=True))

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


def _matrix(head: ExitHead) -> tuple[Tensor, Tensor | None, float | None] | None:
    """Return (weight [classes, width], bias, soft cap) that turn the features of a head into logits, None where these
    are more than that."""
    base: HeadContext | None = head.__dict__.get("base")
    if base is None or type(head).features is ExitHead.features:
        return None
    weight, bias = (getattr(base.projection, name, None) for name in ("weight", "bias"))
    finish, projection = base.finish, base.projection
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return None
    if not isinstance(projection, (nn.Linear, Rows)) or hooked([head, projection]):
        return None  # what is hooked or patched does more than its weights say
    return (weight, bias, finish.cap) if isinstance(finish, Finish) and finish.scale == 1.0 else None


def _statistics(head: ExitHead, state: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return the statistics of what a head says of states [rows, width], without its logits."""
    weight, bias, cap = _matrix(head)  # type: ignore[misc]
    features = head.features(state)
    found = head_stats(features, weight, bias, softcap=cap, needs=parts(needs))  # type: ignore[arg-type]
    return found.named(needs)


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
