"""A budget that only falls, spent at the bottom and at the top."""

import pytest
import torch

import offramp
from offramp.policy import Evidence
from offramp.schedule import runs


def schedule(**options):
    return offramp.policy("position_schedule", **{"max_depth": 12, "min_depth": 4, "length": 9, **options})


def test_the_budget_falls_on_a_line_and_stays_at_its_least():
    policy = schedule()
    assert [policy.budget(t) for t in range(12)] == [12, 11, 10, 9, 8, 7, 6, 5, 4, 4, 4, 4]
    uneven = schedule(max_depth=11, min_depth=4, length=14)
    assert [uneven.budget(t) for t in range(14)] == [round(11 - 7 * t / 13) for t in range(14)]
    assert sum(policy.budget(t) for t in range(9)) / 9 == (12 + 4) / 2


@pytest.mark.parametrize("depth", [12, 16])
@pytest.mark.parametrize("warmup", [0, 1, 3, 4])
def test_the_windows_hold_the_budget_and_are_nested(depth, warmup):
    policy, before = schedule(warmup=warmup), set(range(depth))
    for t in range(12):
        windows = policy.windows(t, depth)
        blocks = {i for start, stop in windows for i in range(start, stop)}
        assert len(blocks) == sum(stop - start for start, stop in windows) == policy.budget(t)
        assert blocks <= before and set(range(warmup)) <= blocks
        assert warmup == policy.budget(t) or depth - 1 in blocks
        before = blocks
    assert schedule(max_depth=depth, warmup=warmup).windows(0, depth) == ((0, depth),)


def test_which_blocks_run_at_each_place():
    policy = schedule(max_depth=3, min_depth=2, length=3)
    table = runs(policy, torch.tensor([[-1, 0, 1, 2, 3]]), 4)
    wanted = {-1: [1, 1, 1, 1], 0: [1, 1, 1, 1], 1: [1, 0, 0, 1], 2: [1, 0, 0, 1], 3: [1, 0, 0, 1]}
    assert table.int().tolist() == [list(wanted.values())]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_depth": 13}, "would grow from 12 to 13 blocks"),
        ({"warmup": 5}, "5 warm-up blocks are more than the smallest budget of 4"),
        ({"length": 1}, "length must be a whole number, at least 2, not 1"),
        ({"min_depth": 0}, "min_depth must be a whole number, at least 1, not 0"),
        ({"max_depth": 2.5}, "max_depth must be a whole number"),
        ({"warmup": -1}, "warmup must be a whole number, at least 0"),
    ],
)
def test_what_could_not_work_is_refused(options, message):
    with pytest.raises(offramp.OfframpError, match=message):
        schedule(**options)


def test_a_model_that_is_too_shallow():
    with pytest.raises(offramp.OfframpError, match="max_depth=12 is more than the 8 blocks of this model"):
        schedule().windows(0, 8)


def test_as_a_policy_over_exits_it_stops_at_the_budget():
    policy = schedule()
    for depth, wanted in ((4, [False, False, True, True]), (6, [False, True, True, True]), (12, [True] * 4)):
        seen = Evidence(0, depth, True, False, position=torch.tensor([0, 6, 8, 50]))
        assert policy.step({}, seen)[0].tolist() == wanted
    with pytest.raises(offramp.OfframpError, match="needs the position"):
        policy.step({}, Evidence(0, 4, True, False, hidden=torch.zeros(1, 2)))
