"""What a policy learns from the deep blocks: whether they agree with tokens that left early and waited for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.policy import ExitPolicy, Feedback, State


class Left(NamedTuple):
    """Rows that left at one exit with one token: exit, slot, bool mask [batch], statistics [batch], answers [batch]."""

    level: int
    slot: int
    rows: Tensor
    stats: Mapping[str, Tensor]
    answers: Tensor


class Learning:
    """Pairs of what a policy saw and whether the full model agreed, gathered over one call and learnt at its end.

    Within a call nothing changes, so rows of a batch stay independent of one another. memory: of the run; what is
    learnt stays there between calls.
    """

    def __init__(self, policy: ExitPolicy, memory: dict[str, Any]) -> None:
        self.policy, self.memory = policy, memory
        before, state = memory.get("learned", (None, None))
        self.state: State | None = state if before == policy else None  # a call may bring a policy of its own
        self.waiting: list[Left] = []
        self.pairs: dict[int, list[tuple[Tensor, dict[str, Tensor]]]] = {}

    def start(self, batch: int, device: torch.device) -> State:
        """Return the policy's state for a new token of every row, with what was learnt."""
        if self.state is None:
            self.state = self.policy.start(1, device)
        return {k: v.expand(batch, *v.shape[1:]) for k, v in self.state.items()}

    def told(self, logits: Tensor, first: int) -> None:
        """Compare what waits with the full model. logits: [batch, n, classes] of the tokens in slots from `first`."""
        best = logits.argmax(-1)
        for left in self.waiting:
            correct = best[left.rows, left.slot - first] == left.answers[left.rows]
            self.pairs.setdefault(left.level, []).append((correct, {k: v[left.rows] for k, v in left.stats.items()}))
        self.waiting.clear()

    def learn(self) -> None:
        """Let the policy learn from the whole call, exit by exit."""
        for level, pairs in sorted(self.pairs.items()):
            stats = {k: torch.cat([s[k] for _, s in pairs]) for k in pairs[0][1]}
            feedback = Feedback(level, correct=torch.cat([c for c, _ in pairs]), stats=stats)
            self.state = self.policy.learn(self.state or {}, feedback)
        self.memory["learned"] = self.policy, self.state
