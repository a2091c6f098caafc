"""Lossless: tokens drafted at exits are checked by the deep blocks, which run once per round on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.draft import Drafter, Look, Outcome, Plan, Setup, Shadow
from offramp.enable import Run
from offramp.engine import decide
from offramp.policy import Evidence
from offramp_hf.decode.branching import Branching
from offramp_hf.decode.choose import agreed
from offramp_hf.decode.clock import WIDER, Clock
from offramp_hf.decode.driver import Driver
from offramp_hf.decode.shadows import shadow_rows

#: least cost of a look (head, statistics, policy) in blocks: on small models it is the calls that cost, 0.1-0.13 of
#: 0.3 ms
LOOK = 0.3


class Draft(NamedTuple):
    """token: [batch, 1]; scores: [batch, classes] that it was drawn from, None of the likeliest one; logits: of the
    exit, None where nobody needs them."""

    token: Tensor
    scores: Tensor | None
    logits: Tensor | None


class Verified(Driver):
    """Self-speculation with one shared cache (arXiv 2404.16710, 2404.18911); a draft rule says who drafts and how far.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        run = self.run
        #: whether every row keeps its own number of drafts, or all the smallest
        self.ragged = run.backbone.ragged  # type: ignore[attr-defined]
        self.rule = run.rule
        self.needs = self.needs | self.rule.needs | {"label"}
        self.spreads |= self.rule.branches
        self.lazy = not self.spreads and run.gate is None and "gate" not in self.needs
        if self.rule not in run.memory:
            setup = setup_of(run)
            run.memory[self.rule] = self.rule.start(setup), Clock(setup)
        self.drafter: Drafter = run.memory[self.rule][0]
        if self.rows.ids.device.type == "cpu":
            self.clock = run.memory[self.rule][1]
        self.asked = self.drafter.levels
        #: looks of this round; None where its drafts came from elsewhere
        self.looked: list[Look] | None = None
        self.drafter.begin(self.rows.batch)

    def generate(self) -> None:
        """Run rounds until every row has stopped."""
        while not self.rows.done:
            if self.clock is None:
                self.round()
                continue
            self.clock.begin(self.rows.batch, self.place.mask is not None, self.ragged and self.rows.batch > 1)
            began, learned = perf_counter(), self.runner.learned + self.answers.learned
            self.round()
            if self.runner.learned + self.answers.learned == learned:
                self.clock.round(perf_counter() - began, self.looked)
            else:
                self.clock.drop()

    def round(self) -> None:
        """Draft, run the deep blocks once on all drafts, commit what they confirm and one token more."""
        self.looked = None
        rows, live = self.rows, [r for r in range(self.rows.batch) if self.rows.live(r)]
        room = max(rows.longest - rows.length[r] - 1 for r in live)
        if self.rule.reads and room > 0:
            texts = [rows.texts[r] if r in live else () for r in range(rows.batch)]
            given = self.drafter.propose(texts, room)
            if any(given):
                self.check(given, live)
                return
        plan = self.drafter.plan(room) if room > 0 else Plan((), 0)
        self.passed = {level: [] for level in range(self.last)} if plan.shadow else {}
        if plan.levels and plan.length > 0 and plan.width > 1:
            Branching(self, plan, live).run()
            return
        drafts: list[Tensor] = []
        guesses: list[Tensor] = []
        looks: list[Look] = []
        token = self.newest()
        if not plan.levels or plan.length < 1:
            self.widen(1)
            self.enter(token, self.last)
        else:
            self.draft(plan, token, drafts, guesses, looks, live)
        self.settle(drafts, guesses, looks, live)

    def draft(
        self,
        plan: Plan,
        token: Tensor,
        drafts: list[Tensor],
        guesses: list[Tensor],
        looks: list[Look],
        live: list[int],
    ) -> None:
        """Fill `drafts` with [batch, 1] tokens, `guesses` with their scores and `looks`; every token waits at an exit.
        """
        more = True
        while True:
            self.widen(len(drafts) + 1)
            state = self.enter(token, plan.levels[0])
            if not more or len(drafts) >= plan.length:
                return
            found = self.ask(plan.levels, state, drafts, looks, live)
            if found is None:
                return
            token = found.token
            drafts.append(token)
            if found.scores is not None:
                guesses.append(found.scores)
            ended = self.rows.batch == 1 and looks[-1].tokens[0] in self.rows.ends
            more = not ended and self.drafter.goes_on(looks[-1], live)

    def ask(
        self, levels: Sequence[int], state: Tensor, drafts: list[Tensor], looks: list[Look], live: list[int]
    ) -> Draft | None:
        """Ask the exits in turn for the next token; returns None to stop drafting."""
        policy = self.run.policy
        memory = policy.start(self.rows.batch, state.device)
        position = self.positions(len(drafts))
        previous = None
        for n, level in enumerate(levels):
            if n:
                state = self.climb(levels[n - 1], level)
            began = perf_counter()
            seen = self.look(level, state, previous, position)
            stop, memory, finite = decide(policy, memory, seen)
            previous = seen.hidden
            scores, token = self.guess(drafts, seen)
            accepted, sure, tokens, bad = _to_host(stop, seen, token, finite)
            self.run.stats.nonfinite += bad
            looks.append(Look(level, len(drafts), sure, tokens, accepted))
            if self.clock is not None:
                self.clock.look(self.spend(began))
            if self.drafter.wants(looks[-1], live):
                looks[-1].drafted = True
                return Draft(token[:, None], scores, seen.prediction)
        return None

    def check(self, given: list[list[int]], live: list[int]) -> None:
        """Verify drafts that no exit made: everything runs in one call of the whole model."""
        count = max(len(row) for row in given)
        rows = [[*row, *[self.rows.pad] * (count - len(row))] for row in given]
        made = torch.tensor(rows, device=self.rows.ids.device)
        self.widen(count + 1)
        self.passed = {}
        self.enter(torch.cat([self.newest(), made], 1), self.last)
        self.settle(list(made.split(1, 1)), [], [], live, [len(row) for row in given])

    def guess(self, drafts: list[Tensor], seen: Evidence) -> tuple[Tensor | None, Tensor]:
        """Return (scores [batch, classes], drafted token [batch]) as the framework would choose from what a head says;
        no scores where it takes the likeliest.
        """
        chooser, prediction = self.chooser, seen.prediction
        if prediction is None or (chooser.plain and not chooser.sample):
            return None, seen.stats["label"]
        extra = torch.cat(drafts, 1) if drafts else None
        parts = []
        for row in range(self.rows.batch):
            prefix = self.rows.prefix(row)
            prefix = prefix if extra is None else torch.cat([prefix, extra[row : row + 1]], 1)
            parts.append(chooser.scores(prefix, prediction[row : row + 1], row))
        scores = torch.cat(parts)
        return scores, chooser.pick(scores.nan_to_num())  # a head's NaN is no error: such a draft is never accepted

    def settle(
        self,
        drafts: list[Tensor],
        guesses: list[Tensor],
        looks: list[Look],
        live: list[int],
        given: list[int] | None = None,
    ) -> None:
        """Run the deep blocks on everything drafted, commit what each row gets, and crop the cache to it.

        given: how many of the drafts were proposed for each row, when no exit made them.
        """
        rows, count = self.rows, len(drafts)
        self.looked = looks if given is None else None
        logits, top = self.answer(self.finish())
        made = torch.cat(drafts, 1).tolist() if drafts else [[] for _ in range(rows.batch)]
        plain = self.chooser.plain and not self.chooser.sample
        best = top.tolist() if plain else None
        # a draft from the text was decided before any block; depth 0 says so
        depth_of = [self.depths[look.level] for look in looks if look.drafted] if given is None else [0] * count
        found: dict[int, tuple[list[int], list[Tensor] | None]] = {}
        for row in live:
            if best is not None:
                found[row] = best[row][: agreed(made[row], best[row]) + 1], None
            else:
                mine = [g[row : row + 1] for g in guesses] if given is None else None  # none was drawn
                found[row] = self.chooser.judge(rows.prefix(row), made[row], logits[row], mine, row)
        counts = [len(tokens) for tokens, _ in found.values()]
        kept = [max(counts) if self.ragged else min(counts)] * rows.batch
        shadows = self.shadows(max(counts)) if self.passed else {}
        for row, (tokens, scores) in found.items():
            kept[row] = min(kept[row], len(tokens))
            drafted = count if given is None else given[row]
            self.commit(row, tokens, scores, logits[row], depth_of, kept[row])
            self.drafter.learn(Outcome(row, tokens, drafted, kept[row], looks, shadows.get(row, ()), given is not None))
            self.run.stats.drafted += drafted
        self.keep(count + 1, kept)

    def answer(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits [..., classes], their largest [...]) of the full model for its last states [..., width]."""
        began = perf_counter()
        found = self.answers.readout(state)
        if self.clock is not None:
            self.spend(began)
        return found

    def shadows(self, count: int) -> dict[int, list[Shadow]]:
        """Return by row what every exit says at the first `count` places of this round."""
        states = {level: torch.cat(parts, 1)[:, :count] for level, parts in self.passed.items()}
        self.passed = {}
        return shadow_rows(self.answers, states)

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


def setup_of(run: Run) -> Setup:
    """Return what a drafter works with, from the model and its exits."""
    at = run.exits.at
    levels = tuple(i for i, depth in enumerate(at) if run.policy.opens(depth))
    return Setup(at, run.backbone.depth, levels, head_cost(run), WIDER)


def head_cost(run: Run) -> float:
    """Return the cost of one look at an exit in blocks: the head's share of weights, and at least LOOK."""
    count: int = sum(p.numel() for p in run.backbone.chain().blocks[0].parameters())
    context, some = run.backbone.context(), run.options.draft_vocabulary
    weights: int = sum(p.numel() for p in context.projection.parameters())
    share = 1.0 if some is None else (some if isinstance(some, int) else len(some)) / context.classes
    return max(LOOK, share * weights / max(count, 1))


def _to_host(
    stop: Tensor, seen: Evidence, token: Tensor, finite: Tensor
) -> tuple[list[bool], list[float], list[int], int]:
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
