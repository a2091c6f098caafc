"""Stopping on the gate's probability."""

import pytest
import torch

import offramp
from offramp.policy import Evidence


def seen(values, index=0):
    return Evidence(index, 2, index == 0, False, stats={"agrees": torch.tensor(values)})


def test_it_stops_at_the_threshold_and_above_and_never_at_nan():
    stop, _ = offramp.policy("gate", threshold=0.5).step({}, seen([0.49, 0.5, 0.51, float("nan")]))
    assert stop.tolist() == [False, True, True, False]


def test_one_threshold_per_exit():
    policy = offramp.policy("gate", threshold=[0.9, 0.2])
    assert [policy.step({}, seen([0.5], i))[0].item() for i in range(2)] == [False, True]


def test_the_ladder_leaves_out_what_it_could_not_be_built_with():
    steps = [rung.threshold for rung in offramp.policy("gate", threshold=0.5).ladder([2], 5)]
    assert steps[0] == 1.0 and steps[-1] == pytest.approx(0.01) and steps == sorted(steps, reverse=True)
