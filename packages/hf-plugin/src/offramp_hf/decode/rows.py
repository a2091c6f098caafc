"""The growing sequences of one `generate` call: ids, stopping, streaming and scores, row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rows:
    """Token ids of every row, each as long as it has become; rows stop on their own, as the framework's would.

    input_ids: [batch, prompt]; criteria: the framework's stopping criteria; longest: most tokens a row may hold.
    """

    def __init__(
        self, input_ids: Tensor, criteria: Any, longest: int, pad: Tensor | None, streamer: Any, keep: Any
    ) -> None:
        self.batch, self.prompt = input_ids.shape
        self.criteria, self.streamer, self.longest = criteria, streamer, longest
        #: the framework pads finished rows only if some criterion knows the end token
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self.pad = 0 if pad is None else int(pad)
        self.ends = {int(e) for c in criteria for e in _as_list(getattr(c, "eos_token_id", None))}
        #: whether all criteria are an end token and the length
        self.simple = all(type(c).__name__ in ("EosTokenCriteria", "MaxLengthCriteria") for c in criteria)
        self.limit = min([longest, *(int(c.max_length) for c in criteria if hasattr(c, "max_length"))])
        self.ids = input_ids.new_full((self.batch, max(longest, self.prompt + 1)), self.pad)
        self.ids[:, : self.prompt] = input_ids
        self.length = [self.prompt] * self.batch
        self.finished: list[int | None] = [None] * self.batch
        self.depths: list[list[int]] = [[] for _ in range(self.batch)]
        self.keep_scores, self.keep_logits = keep
        self.scores: list[list[Tensor]] = [[] for _ in range(self.batch)]
        self.logits: list[list[Tensor]] = [[] for _ in range(self.batch)]
        self.put = self.prompt
        #: the tokens of every row as a list, for who reads the text
        self.texts: list[list[int]] = input_ids.tolist()

    def prefix(self, row: int) -> Tensor:
        """Return the ids of one row so far, [1, length]."""
        return self.ids[row : row + 1, : self.length[row]]

    @property
    def level(self) -> bool:
        """Whether all rows are equally long."""
        return min(self.length) == max(self.length)

    def live(self, row: int) -> bool:
        """Whether a row still takes tokens."""
        # without an end token rows go on until all have stopped, but no further than there is room
        return self.finished[row] is None if self.pads else not self.done and self.length[row] < self.ids.shape[1]

    @property
    def done(self) -> bool:
        """Whether every row has met a stopping criterion (and, without an end token, is as long as the longest)."""
        if any(f is None for f in self.finished):
            return False
        return self.pads or min(self.length) >= self.target

    @property
    def target(self) -> int:
        """Length of the returned rows."""
        return max(f for f in self.finished if f is not None)

    @property
    def stop(self) -> int:
        """Length of what is returned."""
        return max(self.length) if self.pads else self.target

    def commit(
        self, row: int, token: int, depth: int, scores: Tensor | None = None, logits: Tensor | None = None
    ) -> bool:
        """Append one token to one row and ask its criteria; returns whether the row takes more."""
        at = self.length[row]
        self.ids[row, at] = token
        self.texts[row].append(token)
        self.length[row] = at + 1
        self.depths[row].append(depth)
        if self.keep_scores and scores is not None:
            self.scores[row].append(scores.reshape(1, -1))
        if self.keep_logits and logits is not None:
            self.logits[row].append(logits.reshape(1, -1))
        if self.finished[row] is None:
            if self.stops(row, token):
                self.finished[row] = at + 1
        self.stream()
        return self.live(row)

    def stops(self, row: int, token: int) -> bool:
        """Whether some criterion ends a row after its newest token."""
        if self.simple:  # the same answer without tensors: 0.04 ms, 1 % of a token of a small model
            return token in self.ends or self.length[row] >= self.limit
        seen = tuple(self.scores[row]) if self.keep_scores else None
        return bool(self.criteria(self.prefix(row), seen).any())

    def commit_all(
        self, tokens: Tensor, depths: list[int], scores: Tensor | None = None, logits: Tensor | None = None
    ) -> None:
        """Append one token to every row at once; needs rows of equal length. tokens: [batch]."""
        at = self.length[0]
        live = [self.finished[r] is None or not self.pads for r in range(self.batch)]
        self.ids[:, at] = (
            tokens if all(live) else torch.where(tokens.new_tensor(live, dtype=torch.bool), tokens, self.pad)
        )
        self.length = [at + 1] * self.batch
        for row, token in enumerate(self.ids[:, at].tolist()):
            self.texts[row].append(token)
        for row in range(self.batch):
            if live[row]:
                self.depths[row].append(depths[row])
            if self.keep_scores and scores is not None:
                self.scores[row].append(scores[row : row + 1])
            if self.keep_logits and logits is not None:
                self.logits[row].append(logits[row : row + 1])
        seen = tuple(torch.cat(step) for step in zip(*self.scores, strict=True)) if self.keep_scores else None
        for row, over in enumerate(self.criteria(self.ids[:, : at + 1], seen).tolist()):
            if over and self.finished[row] is None:
                self.finished[row] = at + 1
        self.stream()

    def take_back(self, count: int) -> None:
        """Remove the last `count` tokens of every row; none of them may have met a stopping criterion."""
        for row in range(self.batch if count else 0):
            self.length[row] -= count
            self.ids[row, self.length[row] :] = self.pad
            for kept in (self.depths[row], self.scores[row], self.logits[row]):
                del kept[len(kept) - min(count, len(kept)) :]

    def stream(self) -> None:
        """Hand every step that all rows have reached to the streamer."""
        if self.streamer is None:
            return
        reached = min(n if self.live(r) else self.ids.shape[1] for r, n in enumerate(self.length))
        reached = min(reached, max(self.length))
        while self.put < reached:
            self.streamer.put(self.ids[:, self.put].cpu())
            self.put += 1

    def result(self) -> Tensor:
        """Return [batch, longest row] ids, right-padded, with everything streamed and the streamer closed."""
        stop = self.stop
        for row in self.depths:
            del row[stop - self.prompt :]
        if self.streamer is not None:
            while self.put < stop:
                self.streamer.put(self.ids[:, self.put].cpu())
                self.put += 1
            self.streamer.end()
        return self.ids[:, :stop].clone()

    def steps(self, kept: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """Return per-step [batch, classes] tensors; a row that had ended holds zeros."""
        count = min(max(len(row) for row in kept), self.stop - self.prompt)
        zero = torch.zeros_like(next(row[0] for row in kept if row))
        return tuple(torch.cat([row[i] if i < len(row) else zero for row in kept]) for i in range(count))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, (list, tuple, set)) else [value]
