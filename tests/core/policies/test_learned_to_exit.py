"""Exits by a gate's certainty."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.policy import Evidence


def stops(policy, values, index=0):
    said = {"learned_to_exit": torch.tensor(values)}
    return policy.step({}, Evidence(index, 2, index == 0, False, stats=said))[0].tolist()


def test_the_certain_ones_leave():
    assert stops(offramp.policy("learned_to_exit"), [0.99, 0.996, 1.0, float("nan")]) == [False, True, True, False]
    policy = offramp.policy("learned_to_exit", threshold=[0.9, 0.2])
    assert stops(policy, [0.5, 0.95]) == [False, True] and stops(policy, [0.5, 0.1], 1) == [True, False]


@pytest.mark.parametrize("threshold", [0.0, 1.2, [0.5, 0.0]])
def test_a_threshold_that_says_nothing(threshold):
    with pytest.raises(BadArgument, match=r"learned_to_exit: threshold .* is outside \]0, 1\]"):
        offramp.policy("learned_to_exit", threshold=threshold)
