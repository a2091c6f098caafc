"""How alike texts are: values worked out by hand, and a brute-force oracle."""

import itertools
import random

import pytest

from offramp_hf.similarity import METRICS, rouge_l, token_f1

GOLDEN = [  # text, reference, longest common subsequence, tokens in common
    ([1, 2, 3, 4], [1, 2, 3, 4], 4, 4),
    ([1, 2, 3, 4], [4, 3, 2, 1], 1, 4),
    ([1, 2, 3, 4], [1, 9, 3], 2, 2),
    ([1, 1, 1, 2], [1, 2, 2], 2, 2),
    ([5, 6], [7, 8, 9], 0, 0),
    ([], [1], 0, 0),
    ([1], [], 0, 0),
]


@pytest.mark.parametrize(("text", "reference", "longest", "common"), GOLDEN)
def test_golden(text, reference, longest, common):
    for metric, shared in ((rouge_l, longest), (token_f1, common)):
        precision, recall = shared / max(1, len(text)), shared / max(1, len(reference))
        wanted = 2 * precision * recall / (precision + recall) if shared else 0.0
        assert metric(text, reference) == pytest.approx(wanted)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_two_empty_texts_are_alike(name):
    assert METRICS[name]([], []) == 1.0


def test_the_subsequence_is_the_longest_there_is():
    draw = random.Random(0)
    for _ in range(50):
        a, b = ([draw.randrange(3) for _ in range(draw.randrange(1, 8))] for _ in range(2))
        within = {c for n in range(len(b) + 1) for c in itertools.combinations(b, n)}
        longest = max(n for n in range(len(a) + 1) if within & set(itertools.combinations(a, n)))
        assert rouge_l(a, b) == pytest.approx(2 * longest / (len(a) + len(b)))
        assert rouge_l(a, b) == pytest.approx(rouge_l(b, a)) and token_f1(a, b) >= rouge_l(a, b)
