"""Lossless: tokens drafted at exits are checked by the deep blocks, which run once per round on all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.enable import Run
from offramp.engine import decide
from offramp.policy import Evidence
from offramp_hf.decode.driver import Driver
from offramp_hf.decode.pace import Pace

#: longest draft when its length adapts: at 95 % acceptance a longer one gains under 3 %
LONGEST = 12
#: least cost of a look (head, statistics, policy) in blocks: on small models it is the calls that cost, 0.1-0.13 of
#: 0.3 ms
LOOK = 0.3


@dataclass
class Look:
    """One look at an exit: which, at which place of the draft, how confident, and what it predicted, per row."""

    level: int
    place: int
    confidence: list[float | None]
    tokens: list[int]
    drafted: bool = False


class Verified(Driver):
    """Self-speculation with one shared cache (arXiv 2404.16710, 2404.18911), from the first exit that the policy
    accepts.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options = self.run.options
        self.adapt = options.draft is None
        self.longest = options.draft or LONGEST
        #: whether every row keeps its own number of drafts, or all the smallest
        self.ragged = self.run.backbone.ragged  # type: ignore[attr-defined]
        memory = self.run.memory
        if "pace" not in memory:
            memory["pace"] = Pace(self.run.exits.at, self.run.backbone.depth, head_cost(self.run))
        self.pace: Pace = memory["pace"]

    def generate(self) -> None:
        """Run rounds until every row has stopped."""
        while not self.rows.done:
            self.round()

    def round(self) -> None:
        """Draft until the policy no longer accepts, run the deep blocks once, commit what they confirm and one token
        more.
        """
        rows, live = self.rows, [self.rows.live(r) for r in range(self.rows.batch)]
        room = max(rows.longest - rows.length[r] - 1 for r in range(rows.batch) if live[r])
        limit = min(self.longest, room)
        levels = [i for i in range(self.last) if not self.adapt or self.pace.awake(i)] if limit > 0 else []
        drafts: list[Tensor] = []
        guesses: list[Tensor] = []
        looks: list[Look] = []
        chances = [1.0] * rows.batch
        token = self.newest()
        while True:
            self.widen(len(drafts) + 1)
            if not levels:
                self.enter(token, self.last)
                break
            state = self.enter(token, levels[0])
            if len(drafts) >= limit:
                break
            found = self.draft(levels, state, drafts, looks, chances, live)
            if found is None:
                break
            token, scores = found
            drafts.append(token)
            guesses.append(scores)
            if rows.batch == 1 and looks[-1].tokens[0] in rows.ends:
                self.widen(len(drafts) + 1)
                self.enter(token, levels[0])
                break
        self.settle(drafts, guesses, looks, live)

    def draft(
        self,
        levels: list[int],
        state: Tensor,
        drafts: list[Tensor],
        looks: list[Look],
        chances: list[float],
        live: list[bool],
    ) -> tuple[Tensor, Tensor] | None:
        """Ask the exits in turn for the next token; returns ([batch, 1] tokens, their scores), or None to stop
        drafting.
        """
        policy = self.run.policy
        memory = policy.start(self.rows.batch, state.device)
        position = self.positions() + len(drafts)
        previous = None
        for n, level in enumerate(levels):
            if n:
                state = self.climb(levels[n - 1], level)
            seen = self.look(level, state, previous, position)
            stop, memory, finite = decide(policy, memory, seen)
            previous = seen.hidden
            prediction = self.heads[level](state[:, -1]) if seen.prediction is None else seen.prediction
            scores, token = self.guess(prediction, drafts, seen)
            accepted, confidence, tokens, bad = _to_host(stop, seen, token, finite)
            self.run.stats.nonfinite += bad
            one = Look(level, len(drafts), confidence, tokens)
            looks.append(one)
            rate = [c * self.pace.chance(level, p) for c, p in zip(chances, confidence, strict=True)]
            who = [r for r, ok in enumerate(live) if ok]
            wanted = sum(accepted[r] for r in who) * 2 >= len(who)
            if wanted and (not self.adapt or self.pace.pays(level, self.joint([rate[r] for r in who]))):
                one.drafted = True
                chances[:] = rate
                return token[:, None], scores
        return None

    def joint(self, rates: list[float]) -> float:
        """Return the probability that a draft is kept, from that of each row."""
        return sum(rates) / len(rates) if self.ragged else math.prod(rates)

    def guess(self, prediction: Tensor, drafts: list[Tensor], seen: Evidence) -> tuple[Tensor, Tensor]:
        """Return (scores [batch, classes], drafted token [batch]) from a head's prediction, as the framework would
        choose.
        """
        chooser = self.chooser
        if chooser.plain and not chooser.sample:
            return prediction, seen.stats["label"] if "label" in seen.stats else prediction.argmax(-1)
        extra = torch.cat(drafts, 1) if drafts else None
        parts = []
        for row in range(self.rows.batch):
            prefix = self.rows.prefix(row)
            prefix = prefix if extra is None else torch.cat([prefix, extra[row : row + 1]], 1)
            parts.append(chooser.scores(prefix, prediction[row : row + 1], row))
        scores = torch.cat(parts)
        return scores, chooser.pick(scores.nan_to_num())  # a head's NaN is no error: such a draft is never accepted

    def settle(self, drafts: list[Tensor], guesses: list[Tensor], looks: list[Look], live: list[bool]) -> None:
        """Run the deep blocks on everything drafted, commit what each row gets, and crop the cache to it."""
        rows, count = self.rows, len(drafts)
        logits = self.context.readout(self.finish())
        made = torch.cat(drafts, 1).tolist() if drafts else [[] for _ in range(rows.batch)]
        plain = self.chooser.plain and not self.chooser.sample
        best = logits.argmax(-1).tolist() if plain else None
        depth_of = [self.depths[look.level] for look in looks if look.drafted]
        found: dict[int, tuple[list[int], list[Tensor] | None]] = {}
        for row in range(rows.batch):
            if not live[row]:
                continue
            if best is not None:
                same = next((i for i in range(count) if made[row][i] != best[row][i]), count)
                found[row] = best[row][: same + 1], None
            else:
                mine = [g[row : row + 1] for g in guesses]
                found[row] = self.chooser.judge(rows.prefix(row), made[row], logits[row], mine, row)
        counts = [len(tokens) for tokens, _ in found.values()]
        kept = [max(counts) if self.ragged else min(counts)] * rows.batch
        for row, (tokens, scores) in found.items():
            kept[row] = min(kept[row], len(tokens))
            self.commit(row, tokens, scores, logits[row], depth_of, kept[row])
            self.learn(row, tokens, looks, kept[row])
        self.run.stats.drafted += count * sum(live)
        self.keep(count + 1, kept)

    def commit(
        self, row: int, tokens: list[int], scores: list[Tensor] | None, logits: Tensor, depth_of: list[int], kept: int
    ) -> None:
        """Append the first `kept` of a row's tokens one by one; what comes after a stopping criterion is dropped."""
        keep = self.rows.keep_scores
        for i, token in enumerate(tokens[:kept]):
            early = i < len(tokens) - 1
            one = scores[i] if scores is not None else (logits[i : i + 1].float() if keep else None)
            self.run.stats.accepted += early
            if not self.rows.commit(
                row,
                token,
                depth_of[i] if early else self.depths[-1],
                one,
                logits[i : i + 1].float() if self.rows.keep_logits else None,
            ):
                break

    def learn(self, row: int, tokens: list[int], looks: list[Look], kept: int) -> None:
        """Tell the pace which predictions the full model agreed with, and what each look earned in blocks."""
        pace, depth = self.pace, self.depths[-1]
        for one in looks:
            known = one.place < len(tokens)
            if known:
                pace.learn(one.level, one.confidence[row], one.tokens[row] == tokens[one.place])
            if one.drafted:
                won = one.place < kept - 1
                pace.earned(one.level, depth * (won - pace.price(one.level)))
            else:
                pace.earned(one.level, -pace.head)


def head_cost(run: Run) -> float:
    """Return the cost of one look at an exit in blocks: the head's share of weights, and at least LOOK."""
    count: int = sum(p.numel() for p in run.backbone.chain().blocks[0].parameters())
    weights: int = sum(p.numel() for p in run.backbone.context().projection.parameters())
    return max(LOOK, weights / max(count, 1))


def _to_host(
    stop: Tensor, seen: Evidence, token: Tensor, finite: Tensor
) -> tuple[list[bool], list[Any], list[int], int]:
    """Bring what a draft step needs to the host in one transfer; token ids are exact in float64."""
    stats = seen.stats
    if "top1" in stats:
        confidence = stats["top1"]
    elif "margin" in stats:
        confidence = stats["margin"]
    elif "entropy" in stats:
        confidence = (-stats["entropy"]).exp()
    else:
        confidence = torch.zeros_like(token, dtype=torch.float32)
    if stop.device.type == "cpu":  # nothing to wait for: four small reads are 20 us cheaper than packing
        sure = finite.tolist()
        return stop.tolist(), confidence.tolist(), token.tolist(), len(sure) - sum(sure)
    packed = torch.stack([stop.double(), confidence.double(), token.double(), finite.double()]).tolist()
    return [s > 0 for s in packed[0]], packed[1], [int(t) for t in packed[2]], int(len(packed[3]) - sum(packed[3]))
