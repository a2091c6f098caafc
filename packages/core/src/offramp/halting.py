"""Around `quantile_halting`: the answer that all exits give together, each as likely as the row is to stop there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from offramp.errors import BadArgument
from offramp.kernels.halting import halting

if TYPE_CHECKING:
    from offramp.trace import Trace


def expectation(trace: Trace) -> Tensor:
    """Return the probabilities [N, classes] of the exits and the full model, weighed by the halting distribution.

    It takes every exit of every row, so it saves nothing: what a rule that stops is compared with. Raises `BadArgument`
    for a trace without logits or without `lambda`. Paper: PonderNet (arXiv 2107.05407).
    """
    if trace.logits is None or "lambda" not in trace.stats:
        raise BadArgument(
            "the expectation needs the logits and the lambda of every exit; attach with gate='lambda', train it by "
            "offramp.fit(model, data, loss='ponder') and record with offramp.record(model, data, logits=True)"
        )
    share = halting(trace.stats["lambda"][:, :-1].double())
    return (share[..., None] * trace.logits.double().softmax(-1)).sum(1)
