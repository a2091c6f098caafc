"""How alike two texts are, over token ids: the measures that a risk on whole texts is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

Text = Sequence[int]


def rouge_l(text: Text, reference: Text) -> float:
    """Return the F1 of the longest common subsequence, 0 to 1; two empty texts are alike. O(n m) time, O(m) memory.

    Paper: ROUGE (Lin, 2004), with beta = 1.
    """
    row = [0] * (len(reference) + 1)
    for token in text:
        before = 0  # of the row above, one column to the left
        for j, other in enumerate(reference, 1):
            before, row[j] = row[j], before + 1 if token == other else max(row[j], row[j - 1])
    return _f1(row[-1], len(text), len(reference))


def token_f1(text: Text, reference: Text) -> float:
    """Return the F1 of the tokens that both have, counted and without their order, 0 to 1; as SQuAD scores answers."""
    return _f1(sum((Counter(text) & Counter(reference)).values()), len(text), len(reference))


def _f1(shared: int, n: int, m: int) -> float:
    return 2 * shared / (n + m) if n + m else 1.0  # = 2 P R / (P + R) with P = shared / n, R = shared / m


METRICS: dict[str, Callable[[Text, Text], float]] = {"rouge_l": rouge_l, "token_f1": token_f1}
