"""One round with a tree of drafts: grow it at one exit, verify all nodes in one call, keep the path that was right."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.draft import Look, Outcome, Plan
from offramp_hf.decode.place import Tree

if TYPE_CHECKING:
    from offramp_hf.decode.verified import Verified


class Branching:
    """A tree round of a `Verified` driver (EAGLE-2, arXiv 2406.16858; Kangaroo's tree, arXiv 2404.18911)."""

    def __init__(self, driver: Verified, plan: Plan, live: list[int]) -> None:
        self.driver, self.plan, self.live = driver, plan, live
        self.level = plan.levels[0]
        self.tree = Tree(driver.slots, driver.newest())

    def run(self) -> None:
        """Grow, verify, commit."""
        driver = self.driver
        driver.place.tree = self.tree
        try:
            looks = self.grow()
            logits, top = driver.answer(driver.finish())
        finally:
            driver.place.tree = None
        self.settle(logits, top, looks)

    def grow(self) -> list[Look]:
        """Let the tree grow level by level; every node waits at the exit. Returns the look at the first level."""
        driver, plan, tree = self.driver, self.plan, self.tree
        looks: list[Look] = []
        driver.widen(1)
        state = driver.enter(tree.tokens, self.level)
        found = driver.ask((self.level,), state, [], looks, self.live)
        if found is None:
            return looks
        paths = torch.zeros_like(tree.tokens, dtype=torch.float32)  # log-probability of every node of the last level
        logits: Any = found.logits  # known, as the rule branches
        logits = logits[:, None]
        for depth in range(plan.length):
            parents, tokens, paths = self.children(logits, paths)
            tree.grow(parents + tree.seen.shape[1] - logits.shape[1], tokens)
            driver.widen(tree.seen.shape[1])
            state = driver.enter(tokens, self.level)
            if depth + 1 == plan.length or not driver.drafter.deeper(paths.amax(-1).exp().tolist(), self.live):
                break
            logits = self.predict(state)
        return looks

    def children(self, logits: Tensor, paths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (parents, tokens, log-probabilities) [batch, width] of the likeliest children of the last level.

        logits: [batch, nodes, classes]; paths: [batch, nodes].
        """
        width = min(self.plan.width, logits.shape[-1])
        log_p = self.scored(logits).float().log_softmax(-1).nan_to_num(-1e9)
        top, tokens = log_p.topk(width, -1)
        whole = (top + paths[..., None]).flatten(1)
        best, index = whole.topk(min(width, whole.shape[1]), -1)
        return index // width, tokens.flatten(1).gather(1, index), best

    def scored(self, logits: Tensor) -> Tensor:
        """Return logits as the framework's processors would change them, node by node."""
        chooser = self.driver.chooser
        if chooser.plain:
            return logits
        batch, nodes, _ = logits.shape
        first = self.tree.seen.shape[1] - nodes
        parts = [
            chooser.scores(self.prefix(row, first + node), logits[row, node : node + 1], row)
            for row in range(batch)
            for node in range(nodes)
        ]
        return torch.cat(parts).view(batch, nodes, -1)

    def prefix(self, row: int, node: int) -> Tensor:
        """Return the ids [1, length] of a row up to and including a node; node 0 is its newest token already."""
        nodes = [i for i in self.tree.seen[row, node].nonzero().squeeze(-1).tolist() if i]
        head = self.driver.rows.prefix(row)
        return torch.cat([head, self.tree.tokens[row, nodes][None]], 1) if nodes else head

    def predict(self, state: Tensor) -> Tensor:
        """Return the exit's logits [batch, nodes, classes] of the newest nodes."""
        driver = self.driver
        began = perf_counter()
        if self.level in driver.memories:
            memory = driver.memories[self.level]
            memory.read(driver.place)
            state = memory.mixed[:, -state.shape[1] :]
        out = driver.answers.predict(self.level, state)
        if driver.clock is not None:
            driver.spend(began)
        return out

    def settle(self, logits: Tensor, top: Tensor, looks: list[Look]) -> None:
        """Walk every row from node 0 as far as the full model's choice is a node; commit and keep that path."""
        driver, tree, chooser = self.driver, self.tree, self.driver.chooser
        rows, count = driver.rows, tree.seen.shape[1]
        best = top.tolist() if chooser.plain and not chooser.sample else None
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        paths: list[list[int]] = [[0] for _ in range(rows.batch)]
        kept = [1] * rows.batch
        depths = [driver.depths[self.level]] * (count - 1)
        for row in self.live:
            made: list[int] = []
            scores: list[Tensor] | None = None if best is not None else []
            while True:
                node = paths[row][-1]
                if best is not None:
                    choice = best[row][node]
                else:
                    choice = self.choose(logits[row, node : node + 1], row, node, scores)
                made.append(choice)
                below = range(max(1, node + 1), count)
                step = next((i for i in below if parents[row][i] == node and tokens[row][i] == choice), None)
                if step is None:
                    break
                paths[row].append(step)
            kept[row] = len(made)
            driver.run.stats.drafted += count - 1
            driver.commit(row, made, scores, logits[row, paths[row]], depths, kept[row])
            driver.drafter.learn(Outcome(row, made, max(tree.depths), kept[row], looks))
        self.keep(paths, kept)

    def choose(self, logits: Tensor, row: int, node: int, scores: list[Tensor] | None) -> int:
        """Return the full model's choice at one node, drawn when sampling; its scores are kept."""
        chooser = self.driver.chooser
        processed = chooser.scores(self.prefix(row, node), logits, row)
        if scores is not None:
            scores.append(processed)
        return int(chooser.pick(processed))

    def keep(self, paths: list[list[int]], kept: list[int]) -> None:
        """Bring every row's path to the slots behind the text, and forget the other nodes."""
        driver = self.driver
        most = max(kept)
        padded = [path[: kept[r]] + [path[kept[r] - 1]] * (most - kept[r]) for r, path in enumerate(paths)]
        still = next((i for i in range(most) if any(path[i] != i for path in padded)), most)
        if still < most:  # the nodes before stand where they belong
            self.move(driver.slots + still, torch.tensor(padded, device=self.tree.tokens.device)[:, still:] - still)
        driver.keep(most, kept)

    def move(self, start: int, path: Tensor) -> None:
        """Bring the nodes in the slots `start + path` [batch, n] to the slots from `start` on."""
        driver = self.driver
        holders: list[Any] = [*driver.cache.layers, *driver.memories.values()]
        driver.place.tree = self.tree  # what heads have not read yet are nodes still
        try:
            for memory in driver.memories.values():
                memory.catch_up(int(path.max()) + start + 1, driver.place)
        finally:
            driver.place.tree = None
        for holder in holders:
            holder.pick(start, path)
