"""Lossy: a token is taken from the first exit that the policy accepts; deeper keys and values come later or by
projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp.engine import decide
from offramp.errors import BadArgument
from offramp_hf.decode.driver import Driver
from offramp_hf.decode.learning import Learning, Left


class Early(Driver):
    """One token per row and step. kv="catch_up": deep blocks run on all waiting tokens when some row needs them
    (FREE, arXiv 2310.05424); kv="recompute": waiting tokens run again from the first block together with each new one
    (EE-LLM, arXiv 2312.04916), the same text as catch_up at more work; kv="propagate": the exit state goes through
    each deeper block's own key and value projections (CALM, arXiv 2207.07061). When as many tokens wait as the window
    holds, the next one runs the full model whatever its exits would say.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        #: how deep each token has been that waits to run again
        self.reached: list[int] = []
        policy, later = self.run.policy, self.run.options.kv != "propagate"
        self.learning = Learning(policy, self.run.memory) if policy.learns() and later else None
        if self.run.options.rollback is not None:
            self.check_rollback()

    def check_rollback(self) -> None:
        """Raise `BadArgument` where tokens cannot be taken back."""
        why = "tokens that were streamed cannot be taken back" if self.rows.streamer is not None else ""
        why = f"rows would get different lengths (this batch has {self.rows.batch})" if self.rows.batch > 1 else why
        if why:
            raise BadArgument(f"rollback={self.run.options.rollback} works for one row without a streamer: {why}")

    def generate(self) -> None:
        """Run steps until every row has stopped."""
        while not self.rows.done:
            self.step()
        if self.learning is not None:
            self.learning.learn()

    def leave(self) -> None:
        """Run what waits, so that every layer holds every token."""
        if any(self.waiting):
            depth = next(d for d, waits in zip(self.depths, self.waiting, strict=True) if waits)
            self.run.stats.blocks_run += sum(before - depth for before in self.reached) * self.rows.batch
            self.finish()
        super().leave()

    def step(self) -> None:
        """Decide one token per row."""
        self.widen(1)
        tokens = self.newest()
        dead = torch.tensor([not self.rows.live(r) for r in range(self.rows.batch)], device=tokens.device)
        window, waits = self.run.options.window, sum(t.shape[1] for level in self.waiting for t, _ in level)
        if self.run.options.kv == "recompute":
            tokens = self.again(tokens, waits)
        state = self.enter(tokens, 0)
        if window is not None and waits >= window:
            full = torch.full((self.rows.batch,), self.depths[-1], device=tokens.device)
            stopped, answer, depths, level = dead, None, full, None
        else:
            stopped, answer, depths, level = self.exits(state, dead)
        if self.run.options.kv == "recompute":
            self.count_again(self.depths[-1 if level is None else level], level is None)
        if level is None:
            full = self.judge(self.finish())
            answer = full if answer is None else torch.where(stopped[:, None], answer, full)
        elif self.run.options.kv == "propagate":
            self.store(level)
        self.slots += 1
        if answer is None:  # every row had ended before; nothing of this is kept
            return
        prefix = self.rows.ids[:, : self.rows.length[0]]
        scores = self.chooser.scores(prefix, answer)
        self.rows.commit_all(self.chooser.pick(scores), depths.tolist(), scores, answer.float())

    def again(self, tokens: Tensor, waits: int) -> Tensor:
        """Return everything that waits and then `tokens`, [batch, waits + 1]; the slots of what waits are free again.
        """
        older = [t for level in self.waiting for t, _ in level]
        for level in self.waiting:
            level.clear()
        self.cache.crop_to(self.slots - waits)
        for memory in self.memories.values():
            memory.crop(self.slots - waits)
        return torch.cat([*older, tokens], 1)

    def count_again(self, depth: int, complete: bool) -> None:
        """Count the blocks that waiting tokens ran another time, up to `depth`; complete: none waits any more."""
        self.run.stats.blocks_run += sum(min(depth, before) for before in self.reached) * self.rows.batch
        self.reached = [] if complete else [max(depth, before) for before in [*self.reached, depth]]

    def exits(self, state: Tensor, dead: Tensor) -> tuple[Tensor, Tensor | None, Tensor, int | None]:
        """Ask the exits in turn. Returns (rows that stopped, their logits, depth per row, level reached or None for
        full).
        """
        policy, batch = self.run.policy, self.rows.batch
        memory = (self.learning or policy).start(batch, state.device)
        position = self.positions()
        stopped, answer, previous = dead, None, None
        depths = torch.full((batch,), self.depths[-1], device=state.device)
        for level in range(self.last):
            if level:
                frozen = (stopped, state) if self.run.options.kv == "propagate" and batch > 1 else None
                state = self.climb(level - 1, level, frozen)
            seen = self.look(level, state, previous, position)
            stop, memory, finite = decide(policy, memory, seen)
            previous = seen.hidden
            made = seen.prediction
            if made is None and bool(stop.any()):  # nobody has looked at these logits yet
                made = self.predict(level, state)
                finite = finite & made.amax(-1).isfinite()
                confirmed = policy.confirm(memory, made)
                stop = stop & finite if confirmed is None else stop & finite & confirmed
            new = stop & ~stopped
            stopped = stopped | new
            some, every, bad = _facts(new, stopped, finite)
            self.run.stats.nonfinite += bad
            if some and made is not None:
                answer = made if answer is None else torch.where(new[:, None], made, answer)
                depths = torch.where(new, self.depths[level], depths)
                if self.learning is not None:
                    self.learning.waiting.append(Left(level, self.slots, new, seen.stats, made.argmax(-1)))
            if every:
                return stopped, answer, depths, level
        if self.run.options.kv == "propagate" and batch > 1 and bool(stopped.any()):
            self.climb(self.last - 1, self.last, (stopped, state))
        return stopped, answer, depths, None

    def judge(self, states: Tensor) -> Tensor:
        """Return the full model's logits [batch, classes] for the next token, from the last states of all that waited.

        The policy learns whether it agreed; an early token that surprises it too much is taken back with all after it,
        and the next token is then the one in its place.
        """
        limit, last = self.run.options.rollback, states.shape[1] - 1
        if self.learning is None and limit is None:
            return self.answers.readout(states[:, -1])[0]
        logits, _ = self.answers.readout(states)
        if self.learning is not None:
            self.learning.told(logits, self.slots - last)
        if limit is None or not last:
            return logits[:, last]
        end = self.rows.length[0]
        made = self.rows.ids[:, end - last : end]
        surprise = -logits[:, :last].float().log_softmax(-1).gather(-1, made[..., None])[0, :, 0]
        odd = (surprise > limit).nonzero()
        place = int(odd[0]) if len(odd) else last
        self.take_back(last - place)
        return logits[:, place]

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens, of which all blocks have keys and values. Only for one row."""
        self.rows.take_back(count)
        self.slots -= count
        self.cache.crop_to(self.slots + 1)
        for memory in self.memories.values():
            memory.crop(self.slots + 1)
        if self.place.mask is not None:
            self.place.mask = self.place.mask[:, : self.slots + 1]

    def store(self, level: int) -> None:
        """Store keys and values of what waits at `level` in every deeper block."""
        tokens, state = self.waiting[level][0]
        self.waiting[level] = []
        self.runner.fill(tokens, self.depths[level], state, self.place)
        self.run.stats.projected += (self.depths[-1] - self.depths[level]) * self.rows.batch


def _facts(new: Tensor, stopped: Tensor, finite: Tensor) -> tuple[bool, bool, int]:
    """Return (did any row stop here, has every row stopped, rows with odd evidence), with one wait for the device."""
    if new.device.type == "cpu":
        sure = finite.tolist()
        return any(new.tolist()), all(stopped.tolist()), len(sure) - sum(sure)
    some, every, bad = torch.stack([new.any(), stopped.all(), (~finite).sum()]).tolist()
    return bool(some), bool(every), bad
