import pytest
import torch

import offramp
from offramp.policy import Evidence


def test_nothing_stops_before_the_depth():
    policy = offramp.policy("at_least", inner={"policy": "confidence", "threshold": 0.5}, depth=4)
    masks = []
    for i, depth in enumerate((2, 4, 6)):
        seen = Evidence(i, depth, i == 0, i == 2, stats={"top1": torch.tensor([0.9, 0.1])})
        masks.append(policy.step({}, seen)[0].tolist())
    assert masks == [[False, False], [True, False], [True, False]]


def test_counters_go_on_below_the_depth():
    """Patience 1 is reached at depth 2 already; the row stops as soon as it may, though the count has passed 1."""
    policy = offramp.policy("at_least", inner={"policy": "patience", "patience": 1}, depth=4)
    state, masks = policy.start(1, "cpu"), []
    for i in range(5):
        seen = Evidence(i, i + 1, i == 0, i == 4, stats={"label": torch.tensor([7])})
        stop, state = policy.step(state, seen)
        masks.append(stop.item())
    assert masks == [False, False, False, True, True]


def test_deeper_than_every_exit_is_refused():
    policy = offramp.policy("at_least", inner={"policy": "confidence", "threshold": 0.5}, depth=7)
    policy.check((2, 7))
    with pytest.raises(offramp.OfframpError, match="at_least: depth 7 is deeper than every exit"):
        policy.check((2, 6))


def test_ladder_keeps_the_depth():
    rungs = offramp.policy("at_least", inner={"policy": "margin", "threshold": 0.5}, depth=4).ladder((2, 4), 7)
    assert {r.depth for r in rungs} == {4} and rungs[0].inner.threshold == 1.0
