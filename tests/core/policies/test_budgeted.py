"""What a solver found: closed exits, and a depth that nobody passes."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.policy import Evidence
from offramp.testing.calibrators import toy_trace

INNER = {"policy": "confidence", "threshold": [0.5, 0.6, 0.7]}


def columns(**given):
    return offramp.simulate(toy_trace(), offramp.policy("budgeted", inner=INNER, **given)).columns


def test_nobody_leaves_at_a_closed_exit_and_the_others_are_as_before():
    plain, closed = offramp.simulate(toy_trace(), INNER).columns, columns(closed=[2])
    assert (plain == 0).any() and not (closed == 0).any()
    top1 = toy_trace().stats["top1"]
    assert torch.equal(closed == 1, top1[:, 1] >= 0.6)
    assert torch.equal(columns(), plain)


def test_all_rows_leave_at_the_last_depth():
    found = columns(closed=[2], last=6)
    assert set(found.tolist()) == {1, 2}
    trace = toy_trace(20)
    trace.stats["top1"][3, 2] = float("nan")
    out = offramp.simulate(trace, offramp.policy("budgeted", inner={"policy": "never"}, last=6))
    assert out.columns.tolist() == [3 if i == 3 else 2 for i in range(20)]  # a row that is not finite runs on


def test_a_policy_with_a_memory_sees_closed_exits_too():
    """Patience 1 stops at the second of two exits that agree, also when the first of them is closed."""
    inner = offramp.policy("patience", patience=1)
    policy, state = offramp.policy("budgeted", inner=inner, closed=[2]), inner.start(1, "cpu")
    for index, depth in enumerate((2, 4)):
        seen = Evidence(index, depth, index == 0, False, stats={"label": torch.tensor([3])})
        stop, state = policy.step(state, seen)
        assert stop.tolist() == [depth == 4]
    assert policy.opens(2) and not offramp.policy("budgeted", inner=INNER, closed=[2]).opens(2)


def test_the_ladder_keeps_the_exits_closed():
    cal = offramp.calibrate(toy_trace(), offramp.policy("budgeted", inner=INNER, closed=[2]), alpha=0.1)
    assert cal.policy.closed == (2,) and cal.certificate is not None
    with pytest.raises(BadArgument, match="no rung is safe"):
        offramp.calibrate(toy_trace(), offramp.policy("budgeted", inner=INNER, last=6))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"closed": [2, 4, 6]}, "every exit .* is closed"),
        ({"closed": [3]}, r"no exit at depth 3; there are exits at \[2, 4, 6\]"),
        ({"last": 8}, "no exit at depth 8"),
        ({"closed": [2], "last": 2}, "that exit is closed"),
        ({"closed": [0]}, "0 is no depth"),
        ({"last": True}, "True is no depth"),
        ({"inner": 3}, "3 is not a policy"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(BadArgument, match=message):
        offramp.simulate(toy_trace(), offramp.policy("budgeted", **{"inner": INNER, **given}))
