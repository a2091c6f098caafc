"""A readout with a gate beside it: a tiny network that tells from k candidate tokens whether the answer is settled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offramp._registry import lookup, register
from offramp.backbone import Tap
from offramp.errors import BadArgument, check_options
from offramp.head import ExitHead, HeadContext
from offramp.kernels.subset_logits import subset_logits


@register("speculative")
class Speculative(ExitHead):
    """Reads as `inner` does, and predicts from the logits of `candidates` tokens whether that reading is final.

    candidates: k tokens, the k likeliest of the first exit that is looked at; hidden: width of the predictor
    3 k -> hidden -> 1; inner: a head that reads with the backbone's unembedding (tied, shared, translator), with
    `options`. `fit(loss="distill")` trains the readout, `fit(loss="speculative_gate")` the predictors. Raises
    `BadArgument`. Paper: SpecEE (arXiv 2504.08850), there with k = 4 and 512 hidden units.
    """

    gates: ClassVar[tuple[str, ...]] = ("exit_gate.",)

    def __init__(self, base: HeadContext, inner: ExitHead, candidates: int, hidden: int) -> None:
        super().__init__()
        self.share(base)
        self.exit_head, self.candidates = inner, candidates
        self.exit_gate = nn.Sequential(nn.Linear(3 * candidates, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        last: Any = self.exit_gate[-1]
        nn.init.zeros_(last.weight)  # untrained is recognised by it, and refused
        nn.init.zeros_(last.bias)

    @classmethod
    def build(
        cls,
        tap: Tap,
        base: HeadContext,
        candidates: int = 4,
        hidden: int = 512,
        inner: str = "tied",
        options: Mapping[str, Any] | None = None,
    ) -> Speculative:
        """Start as the logit lens with an untrained predictor."""
        for name, value in (("candidates", candidates), ("hidden", hidden)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadArgument(f"speculative: {name} must be a whole number above 0, not {value!r}")
        if candidates > base.classes:
            raise BadArgument(f"speculative: candidates={candidates} of {base.classes} classes; give at most that many")
        weight = getattr(base.projection, "weight", None)
        reads = lookup(ExitHead, inner)
        one = isinstance(weight, Tensor) and weight.shape == (base.classes, base.width)
        if not one or reads is cls or reads.mixes or reads.features is ExitHead.features:
            raise BadArgument(
                f"speculative: inner={inner!r} does not read with one matrix [{base.classes}, {base.width}] of the "
                f"model, of which rows could be taken; choose inner='tied', 'shared' or 'translator' on a model whose "
                f"unembedding is such a matrix"
            )
        given = dict(options or {})
        check_options(given, [n for n in inspect.signature(reads.build).parameters if n not in ("tap", "base")], inner)
        return cls(base, reads.build(tap, base, **given), candidates, hidden)

    def narrowed(self, ids: Tensor) -> ExitHead:
        """Return the inner head for some classes: what a narrow readout says, no predictor judges."""
        inner: Any = self.exit_head
        return inner.narrowed(ids)  # type: ignore[no-any-return]

    @property
    def trained(self) -> bool:
        """Whether the predictor has been trained (or loaded)."""
        last: Any = self.exit_gate[-1]
        return bool((last.weight != 0).any())

    def features(self, hidden: Tensor) -> Tensor:
        """Return what the backbone's projection reads, [..., width]."""
        inner: Any = self.exit_head
        out: Tensor = inner.features(hidden)
        return out

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden [..., width] to logits [..., classes]."""
        out: Tensor = self.exit_head(hidden)
        return out

    @torch.no_grad()
    def draft(self, hidden: Tensor, prediction: Tensor | None = None) -> dict[str, Tensor]:
        """Return what a row takes along from its first exit: `candidates` [rows, k] and `p`, zeros [rows, k].

        hidden: [rows, width]; prediction: this head's logits [rows, classes] where they are known already.
        """
        best = (self(hidden) if prediction is None else prediction).topk(self.candidates, dim=-1).indices
        return {"candidates": best, "p": torch.zeros_like(best, dtype=torch.float32)}

    @torch.no_grad()
    def statistics(self, hidden: Tensor, candidates: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([rows, 3 k] logits z, p = softmax(z) and p - before; p [rows, k]), in float32.

        candidates: int64 [rows, k]; before: p of the exit asked before, zeros at the first.
        """
        base: HeadContext = self.__dict__["base"]
        some: Any = base.projection
        logits = subset_logits(self.features(hidden), some.weight, candidates, getattr(some, "bias", None))
        z = base.finish(logits).float()
        p = z.softmax(-1)
        return torch.cat([z, p, p - before], -1), p

    def gate(self, hidden: Tensor, candidates: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logit [rows] of this exit being right, p [rows, k] for the next exit); arguments of `statistics`."""
        seen, p = self.statistics(hidden, candidates, before)
        first: Any = self.exit_gate[0]
        return self.exit_gate(seen.to(first.weight.dtype)).squeeze(-1).float(), p
