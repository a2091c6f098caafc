"""Choose tokens from logits as the framework does, and accept or replace drafted ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadArgument
from offramp_hf._compat import in_turn, processors_of_row, reads_scores_alone


class Chooser:
    """The framework's logits processors followed by argmax or sampling, and the acceptance rules of speculation.

    processors: a `LogitsProcessorList`; sample: whether `do_sample` is set.
    """

    def __init__(self, processors: Any, sample: bool) -> None:
        self.processors, self.sample = processors, sample
        self.plain = not len(processors)
        #: whether all of them are the framework's and look at no token, so that all drafts can be processed at once
        self.blind = all(map(reads_scores_alone, processors))
        self.of_row: dict[int | None, Any] = {None: in_turn(processors)}

    def scores(self, prefix: Tensor, logits: Tensor, row: int | None = None) -> Tensor:
        """Return processed scores in float32. prefix: [rows, length]; logits: [rows, classes]; row: the one row of the
        batch that this is, None for the whole batch."""
        if self.plain:
            return logits.float()
        if self.blind:
            return self.of_row[None](prefix, logits.float())  # type: ignore[no-any-return]
        with torch.inference_mode(False), torch.no_grad():  # user code gets ordinary tensors
            if row is not None and row not in self.of_row:
                self.of_row[row] = in_turn(processors_of_row(self.processors, row))
            out: Tensor = self.of_row[row](prefix, logits.to(torch.float32, copy=True))
        if out.shape != logits.shape:
            raise BadArgument(
                f"a logits processor answered {list(logits.shape)} scores with {list(out.shape)}: with verify=True "
                f"rows have prefixes of different length and processors are called row by row, so one that knows its "
                f"place in the batch cannot work; use verify=False, or generate row by row"
            )
        return out

    def pick(self, scores: Tensor) -> Tensor:
        """Return one token per row. scores: [rows, classes]."""
        if not self.sample:
            return scores.argmax(-1)
        return draw(scores.softmax(-1))

    def judge(
        self, prefix: Tensor, drafts: list[int], logits: Tensor, guesses: list[Tensor] | None, row: int | None = None
    ) -> tuple[list[int], list[Tensor]]:
        """Return the tokens that one row really gets, and their scores: accepted drafts and one more.

        prefix: [1, length]; logits: [drafts + 1, classes] of the full model; guesses: scores [1, classes] that each
        draft was chosen from, None where each was certain, with probability 1. Greedy: drafts are kept while they are
        the full model's choice. Sampling: a draft x is kept with probability min(1, p(x) / q(x)), else replaced by a
        draw from max(0, p - q) (arXiv 2211.17192), so that every token has the full model's distribution.
        """
        tokens: list[int] = []
        kept: list[Tensor] = []
        while True:
            at = len(tokens)
            some = slice(at, None) if self.blind else slice(at, at + 1)
            scores = self.scores(prefix, logits[some], row)
            made, ended = self._accept(scores, drafts[some], guesses and guesses[some])
            tokens += made
            kept += scores.unbind()[: len(made)]
            if ended or len(tokens) > len(drafts):
                return tokens, kept
            prefix = torch.cat([prefix, prefix.new_tensor([made])], 1)

    def _accept(self, scores: Tensor, drafts: list[int], guesses: list[Tensor] | None) -> tuple[list[int], bool]:
        """Return (the tokens of these places, whether the last one replaces a draft). scores: [places, classes], of as
        many drafts or one place more."""
        count = len(drafts)
        if not self.sample:
            best = scores.argmax(-1).tolist()
            same = agreed(drafts, best)
            return best[: same + 1], same < count
        p = scores.softmax(-1)
        if count:
            chosen = torch.tensor(drafts, device=p.device)[:, None]
            chance = p[:count].gather(1, chosen)
            q = None if guesses is None else torch.cat(guesses).softmax(-1)
            luck = torch.rand_like(chance)
            keep = (luck if q is None else luck * q.gather(1, chosen)) < chance
            same = agreed([True] * count, keep.flatten().tolist())
            if same < count:
                instead = draw(_rest(p[same], drafts[same], None if q is None else q[same])[None])
                return [*drafts[:same], int(instead)], True
        return [*drafts, *draw(p[count:]).tolist()], False


def agreed(drafts: Sequence[int], found: Sequence[int]) -> int:
    """Return how many drafts come before the first one that is not what was found in its place."""
    return next((i for i, draft in enumerate(drafts) if draft != found[i]), len(drafts))


def _rest(p: Tensor, draft: int, q: Tensor | None) -> Tensor:
    """Return max(0, p - q) [classes] for a draft that was not kept; q: what it was drawn from, None where it was
    certain."""
    if q is None:
        rest = p.index_fill(0, torch.tensor([draft], device=p.device), 0.0)
    else:
        rest = (p - q).clamp(min=0)
    # p == q up to rounding leaves nothing: any draw from p has the right distribution then
    return rest if float(rest.sum()) > 0 else p


def draw(weights: Tensor) -> Tensor:
    """Return one class per row, as likely as its weight is large. weights: [rows, classes], from 0 on.

    One random number per row: `torch.multinomial` draws one per class, 99 microseconds for 4,096 of them on a CPU, and
    this takes 12. Raises `RuntimeError` for weights that sum to nothing or are no numbers.
    """
    below = weights.cumsum(-1, dtype=torch.float64)
    total = below[:, -1:]
    torch._assert_async((total > 0).all(), "probabilities are no numbers, or all of them are 0")
    return torch.searchsorted(below, torch.rand_like(total) * total, right=True).squeeze(1)
