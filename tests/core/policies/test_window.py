"""The window: rows outside it leave on either side, and the scales that a calibration walks."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.policies.window import SCALES
from offramp.policy import Evidence
from offramp.testing.calibrators import toy_trace


def seen(values, index=0, name="top1"):
    return Evidence(index, index + 1, index == 0, False, classes=5, stats={name: torch.tensor(values)})


def test_rows_outside_leave_and_the_ends_belong_to_the_window():
    policy = offramp.policy("window", inner="confidence", low=0.5, high=0.75)
    stop, _ = policy.step({}, seen([0.49, 0.5, 0.6, 0.75, 0.76, float("nan")]))
    assert stop.tolist() == [True, False, False, False, True, False]


def test_one_window_per_exit_and_any_score():
    policy = offramp.policy("window", inner="entropy", low=[0.1, 1.0], high=[0.5, 1.0])
    found = [policy.step({}, seen([0.05, 0.3, 1.0, 1.1], i, "entropy"))[0].tolist() for i in (0, 1)]
    assert found == [[True, False, True, True], [True, True, False, True]]


def test_the_threshold_of_the_inner_policy_does_not_matter():
    trace = toy_trace()
    made = [
        offramp.policy("window", inner=offramp.policy("margin", threshold=t), low=0.3, high=0.6) for t in (0.01, 0.99)
    ]
    one, other = (offramp.simulate(trace, policy) for policy in made)
    assert torch.equal(one.columns, other.columns) and len(one.columns.unique()) == 4


def test_the_ladder_narrows_each_window_around_its_own_middle():
    rungs = offramp.policy("window", inner="confidence", low=[0.4, 0.2], high=[0.6, 0.8]).ladder((2, 4), 5)
    assert len(rungs) == len(SCALES) and (rungs[-1].low, rungs[-1].high) == ((0.5, 0.5), (0.5, 0.5))
    assert rungs[0].low == pytest.approx((0.5 - 6.4, 0.5 - 19.2))
    same = rungs[SCALES.index(1.0)]
    assert (*same.low, *same.high) == pytest.approx((0.4, 0.2, 0.6, 0.8))


def test_its_width_can_be_certified():
    first, other = toy_trace(1000), toy_trace(1000, seed=1)
    fitted = offramp.calibrate(first, "confidence", method="window_fit")
    cal = offramp.calibrate(other, fitted, alpha=0.1)
    assert cal.certificate is not None and cal.policy.name == "window"
    assert offramp.simulate(other, cal).saved > 0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 0.8, "high": 0.2}, "low=0.8 is above high=0.2"),
        ({"low": [0.1, 0.2], "high": [0.3, 0.4, 0.5]}, r"low and high hold \[2, 3\] numbers"),
        ({"low": float("-inf"), "high": 1}, "not finite; to never exit"),
        ({"low": "a", "high": 1}, "low must be a number"),
        ({"low": [], "high": 1}, "low must be a number"),
        ({"inner": "patience", "low": 0, "high": 1}, "has no option 'threshold'"),
        ({"inner": {"policy": "patience", "patience": 2}, "low": 0, "high": 1}, "Patience has no score"),
        ({"inner": 3, "low": 0, "high": 1}, "3 is not a policy"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(BadArgument, match=message):
        offramp.policy("window", **{"inner": "confidence", **given})


def test_a_window_for_other_exits_is_refused():
    policy = offramp.policy("window", inner="confidence", low=[0.1, 0.2], high=0.9)
    with pytest.raises(BadArgument, match="2 bounds for 3 exits"):
        offramp.simulate(toy_trace(), policy)
    with pytest.raises(BadArgument, match="give it a width"):
        offramp.policy("window", inner="confidence", low=0.5, high=0.5).ladder((2,), 5)
