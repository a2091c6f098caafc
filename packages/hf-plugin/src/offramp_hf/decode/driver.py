"""The windowed decoder: new tokens climb from exit to exit and wait there; deeper blocks run later, on all of them at
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from offramp.enable import Run
from offramp.engine import LOGITS, look
from offramp.head import ExitHead
from offramp.policy import Evidence
from offramp_hf.cache import WindowCache
from offramp_hf.decode.answers import Answers
from offramp_hf.decode.choose import Chooser
from offramp_hf.decode.clock import Clock
from offramp_hf.decode.mixing import Memory
from offramp_hf.decode.place import Place
from offramp_hf.decode.rows import Rows


class Driver:
    """What both ways of decoding share: levels, waiting states, and the slots of the cache.

    Level i < len(exits) is exit i; the last level is the full model. Tokens that wait at a level are a run of
    neighbours, and later ones than those at deeper levels, so every block sees the tokens in order and its keys and
    values are exact.
    """

    def __init__(
        self, run: Run, rows: Rows, chooser: Chooser, runner: Any, cache: WindowCache, mask: Tensor | None
    ) -> None:
        self.run, self.rows, self.chooser, self.runner, self.cache = run, rows, chooser, runner, cache
        self.depths = (*run.exits.at, run.backbone.depth)
        self.last = len(run.exits.at)
        self.heads: list[ExitHead] = [run.exits[d] for d in run.exits.at]
        self.context = run.backbone.context()
        self.needs = run.policy.statistics()
        #: whether somebody wants the logits of all classes at every look
        self.spreads = "prediction" in self.needs or chooser.sample or not chooser.plain
        #: whether nobody needs the logits of a look, but for the statistics
        self.lazy = False
        self.slots = cache.shortest()
        #: tokens in the cache that are not in the ids, when a call brings a cache and only the tokens after it
        self.older = max(0, self.slots - rows.prompt)
        self.place = Place(mask, self.older + rows.longest)
        #: how far right the slots of each row were moved
        self.shift = [0] * rows.batch
        self.waiting: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.depths]
        #: exits that may be asked
        self.asked: Sequence[int] = range(self.last)
        #: what heads that read earlier states remember, by level
        self.memories: dict[int, Memory] = {}
        self.clock: Clock | None = None
        #: states that reached a level in this round, by level, when someone asks for them afterwards
        self.passed: dict[int, list[Tensor]] = {}

    def begin(self, states: dict[int, Tensor]) -> None:
        """Start inside `runner.running()`. states: of the prompt, by depth, for heads that read earlier states."""
        given = self.run.options.draft_vocabulary
        key = self.needs, given
        answers = self.run.memory.get(key)
        if answers is None:
            ids = range(given) if isinstance(given, int) else given
            answers = self.run.memory[key] = Answers(self.heads, self.context, self.needs, ids)
        self.answers: Answers = answers
        answers.begin(self.run.options.compile)
        self.read_prompt(states)

    def read_prompt(self, states: dict[int, Tensor]) -> None:
        """Take in the states of the prompt by depth: what heads that read earlier states have to have seen."""
        for level, head in enumerate(self.heads):
            if type(head).mixes and level in self.asked:
                state = states[self.depths[level]]
                mix = partial(self.answers.mix, level)
                self.memories[level] = Memory(mix, self.runner, self.slots - state.shape[1])
                self.memories[level].pending.append(state)

    def newest(self) -> Tensor:
        """Return the newest token of every row, [batch, 1]: the only one that no block has seen."""
        if self.rows.batch == 1 or self.rows.level:
            at = self.rows.length[0] - 1
            return self.rows.ids[:, at : at + 1]
        at_rows = torch.tensor(self.rows.length, device=self.rows.ids.device)[:, None] - 1
        return self.rows.ids.gather(1, at_rows)

    def window(self, tokens: Tensor, low: int, high: int, hidden: Tensor | None, frozen: Any = None) -> Tensor:
        """Run the blocks between two levels (low -1: from the embeddings) and count them."""
        start = 0 if low < 0 else self.depths[low]
        stop = self.depths[high]
        began = perf_counter()
        state: Tensor = self.runner.window(tokens, start, stop, hidden, self.place, frozen)
        if self.clock is not None:
            self.clock.window(self.spend(began), start, stop, tokens.shape[1])
        self.run.stats.blocks_run += (stop - start) * self.rows.batch
        if high == self.last:
            self.run.stats.rounds += 1
        if high in self.memories:
            self.memories[high].pending.append(state)
        if high in self.passed:
            self.passed[high].append(state)
        return state

    def spend(self, began: float) -> float:
        """Return the seconds since `began` and count them as spent in blocks, heads or readout."""
        seconds = perf_counter() - began
        self.run.stats.busy += seconds
        return seconds

    def legs(self, low: int, high: int) -> list[int]:
        """Return the levels to stop at on the way from `low` to `high`: those where someone wants every state."""
        return [i for i in range(low + 1, high) if i in self.memories or i in self.passed] + [high]

    def enter(self, tokens: Tensor, level: int) -> Tensor:
        """Bring new tokens [batch, new] to `level`, where they wait; returns their states [batch, new, width]."""
        low, state = -1, None
        for stop in self.legs(-1, level):
            state = self.window(tokens, low, stop, state)
            low = stop
        self.waiting[level].append((tokens, state))  # type: ignore[arg-type]
        return state  # type: ignore[return-value]

    def climb(self, low: int, high: int, frozen: Any = None) -> Tensor:
        """Bring everything that waits at level `low` to level `high`; returns the newest state [batch, 1, width]."""
        tokens, states = _join(self.waiting[low])
        self.waiting[low] = []
        for stop in self.legs(low, high):
            states = self.window(tokens, low, stop, states, frozen)
            low = stop
        self.waiting[high].append((tokens, states))
        return states[:, -1:]

    def finish(self) -> Tensor:
        """Bring everything that waits through the full model; returns the last states [batch, n, width] in order."""
        for low in range(self.last):
            if self.waiting[low]:
                high = next(j for j in range(low + 1, self.last + 1) if self.waiting[j] or j == self.last)
                self.climb(low, high)
        state = _join(self.waiting[self.last])[1]
        self.waiting[self.last] = []
        return state

    def look(self, index: int, state: Tensor, previous: Tensor | None, position: Tensor) -> Evidence:
        """Return the evidence of exit `index` for the newest tokens. state: [batch, 1, width]."""
        given = None
        if self.needs & LOGITS:
            logits, stats = self.answers.look(index, self.read(index, state), self.lazy)
            if logits is not None and self.spreads:
                logits = self.answers.spread(logits)
            given = logits, stats, self.context.classes if self.spreads else self.answers.classes
        return look(self.run, index, state[:, -1], previous, position, given, self.needs, self.rows.depths)

    def predict(self, index: int, state: Tensor) -> Tensor:
        """Return the logits [batch, classes] of exit `index` for the newest tokens. state: [batch, new, width]."""
        return self.answers.predict(index, self.read(index, state))

    def read(self, index: int, state: Tensor) -> Tensor:
        """Return what the head of exit `index` predicts the newest tokens from, [batch, width]."""
        if index in self.memories:
            state = self.memories[index].read(self.place)
        return state[:, -1]

    def positions(self, more: int = 0) -> Tensor:
        """Return how many tokens each row has generated, int64 [batch]; more: drafts on top."""
        made = [length - self.rows.prompt + more for length in self.rows.length]
        return torch.tensor(made, device=self.rows.ids.device)

    def keep(self, new: int, kept: list[int]) -> None:
        """Keep the first `kept[row]` of the `new` newest slots of each row; every row ends at the same slot again.

        Rows that keep fewer are moved right and padded left: positions live in the keys, so moving slots changes
        nothing.
        """
        most = max(kept)
        total = self.slots + most
        self.cache.crop_to(total)
        for memory in self.memories.values():
            memory.crop(total)
        place = self.place
        if min(kept) != most or place.mask is not None:
            device = self.rows.ids.device
            counts = torch.tensor(kept, device=device)
            base = torch.ones((len(kept), self.slots), dtype=torch.long, device=device)
            mask = torch.cat(
                [base if place.mask is None else place.mask[:, : self.slots], base.new_ones((len(kept), most))], 1
            )
            if min(kept) != most and self.runner.holes:
                mask[:, self.slots :] = torch.arange(most, device=device) < counts[:, None]
            elif min(kept) != most:
                shift = (most - counts)[:, None]
                index = torch.arange(total, device=device)[None] - shift
                mask = mask.gather(1, index.clamp(min=0)) * (index >= 0)
                for layer in self.cache.layers:
                    layer.gather(index.clamp(min=0))
                for memory in self.memories.values():
                    memory.gather(index.clamp(min=0), place)
                self.shift = [s + most - k for s, k in zip(self.shift, kept, strict=True)]
            place.mask = mask
        self.slots = total

    def leave(self) -> None:
        """Leave the cache as the framework does: token j of a row in slot j, all but the newest token."""
        length = self.older + self.rows.stop - 1
        mask = self.place.mask
        if self.runner.holes and mask is not None:
            first = self.older + self.rows.prompt  # padding of the prompt stays
            order = (1 - mask[:, first : self.slots]).argsort(dim=1, stable=True)[:, : length - first] + first
            stem = torch.arange(first, device=order.device).expand(len(order), -1)
            for layer in self.cache.layers:
                layer.gather(torch.cat([stem, order], 1))
        if any(self.shift):
            shift = torch.tensor(self.shift, device=self.rows.ids.device)[:, None]
            index = torch.arange(length, device=shift.device)[None] + shift
            for layer in self.cache.layers:
                layer.gather(index.clamp(max=layer.length - 1))
        self.cache.crop_to(length)

    def widen(self, new: int) -> None:
        """Let the mask cover `new` more slots; they are all seen."""
        mask = self.place.mask
        if mask is not None and mask.shape[1] < self.slots + new:
            self.place.mask = torch.cat([mask, mask.new_ones((len(mask), self.slots + new - mask.shape[1]))], 1)


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([t for t, _ in parts], 1), torch.cat([s for _, s in parts], 1)
