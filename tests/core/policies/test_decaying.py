"""CALM's paper form: 0.9 t + 0.1 exp(-tau position / length), clipped to [0, 1]."""

import math

import pytest
import torch

import offramp
from offramp.policy import Evidence


def seen(score, position, name="top1", index=1):
    where = None if position is None else torch.tensor(position)
    return Evidence(index, 4, index == 0, True, position=where, stats={name: torch.tensor(score)})


def threshold_at(policy, position):
    """Find the threshold that acts, by bisection on the score."""
    low, high = -0.5, 1.5
    for _ in range(40):
        middle = (low + high) / 2
        stop = bool(policy.step({}, seen([middle], [position]))[0][0])
        low, high = (low, middle) if stop else (middle, high)
    return high


@pytest.mark.parametrize("tau", [4.0, 1.0, 0.0])
@pytest.mark.parametrize("position", [0, 5, 10, 100])
def test_the_threshold_follows_the_paper_form(tau, position):
    policy = offramp.policy("decaying", inner="confidence", threshold=0.6, length=10, tau=tau)
    expected = 0.9 * 0.6 + 0.1 * math.exp(-tau * position / 10)
    assert threshold_at(policy, position) == pytest.approx(expected, abs=1e-6)


def test_it_is_not_the_form_in_the_authors_code():
    """There the second term carries another factor t: 0.9 * 0.5 + 0.1 * 0.5 = 0.5 at position 0, not 0.55."""
    policy = offramp.policy("decaying", inner="confidence", threshold=0.5, length=10)
    assert policy.step({}, seen([0.52, 0.56], [0, 0]))[0].tolist() == [False, True]


def test_clipped_to_one_so_that_a_certain_row_can_stop():
    policy = offramp.policy("decaying", inner="confidence", threshold=1.0, length=10)
    assert policy.step({}, seen([1.0], [0]))[0].tolist() == [True]


def test_clipped_to_zero_where_a_cosine_threshold_is_negative():
    policy = offramp.policy("decaying", inner="saturation", threshold=-1.0, length=10)
    assert policy.step({}, seen([-0.1, 0.1], [0, 0], name="cosine"))[0].tolist() == [False, True]


def test_rows_have_their_own_positions():
    policy = offramp.policy("decaying", inner="margin", threshold=0.5, length=4)
    stop, _ = policy.step({}, seen([0.5, 0.5, float("nan")], [0, 4, 4], name="margin"))
    assert stop.tolist() == [False, True, False]


def test_per_exit_thresholds_of_the_inner_policy():
    policy = offramp.policy("decaying", inner="confidence", threshold=[0.9, 0.1], length=4, tau=0.0)
    assert policy.step({}, seen([0.5], [9], index=0))[0].tolist() == [False]
    assert policy.step({}, seen([0.5], [9], index=1))[0].tolist() == [True]


def test_saturation_inside_still_never_stops_at_the_first_exit():
    policy = offramp.policy("decaying", inner=offramp.policy("saturation", threshold=0.0), length=4)
    assert policy.step({}, seen([1.0], [4], name="cosine", index=0))[0].tolist() == [False]


def test_without_positions_it_says_what_to_write():
    policy = offramp.policy("decaying", inner="confidence", threshold=0.5, length=4)
    with pytest.raises(offramp.OfframpError, match="needs the position .*'policy': 'confidence'"):
        policy.step({}, seen([0.5], None))


def test_ladder_wraps_that_of_the_inner_policy():
    rungs = offramp.policy("decaying", inner="margin", threshold=0.5, length=4, tau=2.0).ladder((2, 4), 7)
    assert rungs[0] == offramp.policy("decaying", inner="margin", threshold=1.0, length=4, tau=2.0)
    assert rungs[-1].inner.threshold == 0.0 and rungs[-1].length == 4
