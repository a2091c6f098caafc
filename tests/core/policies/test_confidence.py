import torch

import offramp
from offramp.policy import UNIT_GRID, Evidence


def seen(index=0, top1=(0.95, 0.9, 0.8999, float("nan"))):
    return Evidence(index, 2 * index + 2, index == 0, index == 2, stats={"top1": torch.tensor(top1)})


def test_stops_at_or_above_the_threshold():
    stop, _ = offramp.policy("confidence", threshold=0.9).step({}, seen())
    assert stop.tolist() == [True, True, False, False]  # equal stops, NaN does not


def test_one_threshold_per_exit():
    policy = offramp.policy("confidence", threshold=[0.99, 0.9, 0.0])
    assert [policy.step({}, seen(i))[0].tolist() for i in range(3)] == [
        [False, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
    ]


def test_the_ends_of_the_range():
    assert offramp.policy("confidence", threshold=1).step({}, seen(top1=(1.0, 0.999)))[0].tolist() == [True, False]
    assert offramp.policy("confidence", threshold=0).step({}, seen(top1=(0.0, 0.5)))[0].tolist() == [True, True]


def test_ladder_is_a_fixed_grid_from_one_to_zero():
    rungs = [p.threshold for p in offramp.policy("confidence", threshold=[0.1, 0.2]).ladder((2, 4), 7)]
    assert rungs == list(UNIT_GRID) and rungs[0] == 1.0 and rungs[-1] == 0.0
    assert rungs == sorted(set(rungs), reverse=True)
    assert max(a - b for a, b in zip(rungs, rungs[1:], strict=False)) <= 0.0101
