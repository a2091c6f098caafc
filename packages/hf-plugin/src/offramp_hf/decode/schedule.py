"""Lossy: which blocks a token runs follows from its position; no exit is asked."""

from __future__ import annotations

from typing import Any

from offramp.errors import BadArgument
from offramp_hf.decode.driver import Driver


class Schedule(Driver):
    """One token per row and step, the same blocks for all rows (SkipDecode, arXiv 2307.02628).

    Blocks that a token skips are skipped by all later ones, so those that run hold every token: their keys and values
    are never computed again or copied, and the final readout reads the state as it is.
    """

    def generate(self) -> None:
        """Run steps until every row has stopped."""
        while not self.rows.done:
            self.step()

    def step(self) -> None:
        """Run the blocks of this position on the newest token of every row, and take the next from what they say."""
        rows, stats, depth = self.rows, self.run.stats, self.run.backbone.depth
        policy: Any = self.run.policy
        position = rows.length[0] - rows.prompt
        windows = policy.windows(position, depth)
        self.widen(1)
        tokens = self.newest()
        state: Any = None
        for start, stop in windows:
            self.complete(position, start, stop)
            state = self.runner.window(tokens, start, stop, state, self.place)
        blocks = sum(stop - start for start, stop in windows)
        stats.blocks_run += blocks * rows.batch
        stats.rounds += windows[-1][1] == depth
        self.slots += 1
        answer = self.context.readout(state[:, -1])
        scores = self.chooser.scores(rows.ids[:, : rows.length[0]], answer)
        rows.commit_all(self.chooser.pick(scores), [blocks] * rows.batch, scores, answer.float())

    def complete(self, position: int, start: int, stop: int) -> None:
        """Raise when a block of the window lacks tokens: the policy let a block come back."""
        for index in range(start, stop):
            if (held := self.cache.layers[index].get_seq_length()) != self.slots:
                raise BadArgument(
                    f"{type(self.run.policy).__name__}: token {position} runs block {index}, which holds keys and "
                    f"values of {held} of {self.slots} tokens: the blocks of a position must be among those of every "
                    f"earlier one"
                )
