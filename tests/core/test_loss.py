"""Schedules of the exits' weights, and what every loss does with them."""

import math

import pytest
import torch

import offramp
from offramp._registry import create
from offramp.errors import BadArgument
from offramp.loss import Moment, Schedule


def test_linear_and_cosine_by_hand():
    up, down = Schedule("linear", 0.2, 1.0, 4), Schedule("cosine", 1.0, 0.5, 4)
    assert [up.at(s) for s in (0, 1, 2, 4, 9)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])
    quarter = 0.5 * (math.cos(1.25 * math.pi) + 1)
    assert [down.at(s) for s in (0, 1, 2, 4, 9)] == pytest.approx([1.0, 1 - 0.5 * quarter, 0.75, 0.5, 0.5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("square", 0, 1, 5), 'shape must be "linear" or "cosine"'),
        (("linear", -1, 1, 5), "start must be a weight from 0 on"),
        (("linear", 0, math.inf, 5), "stop must be a weight"),
        (("linear", 0, 1, 0), "over must be a whole number of steps"),
    ],
)
def test_schedules_that_mean_nothing(given, message):
    with pytest.raises(BadArgument, match=message):
        Schedule(*given)


@pytest.mark.parametrize("name", ["labels", "distill"])
def test_losses_of_exits_alone_are_scaled_as_a_whole(name):
    made, targets = create(offramp.Loss, name), torch.randint(5, (6,))
    exits, final = torch.randn(3, 6, 5).unbind(0), torch.randn(6, 5)
    whole = made(exits, final, targets)
    assert made(exits, final, targets, moment=Moment(0.25)).item() == pytest.approx(whole.item() / 4)
