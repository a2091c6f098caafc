import pytest
import torch

import offramp
from offramp.policy import Evidence


def test_stops_at_or_above_the_cosine_but_never_at_the_first_exit():
    policy = offramp.policy("saturation", threshold=0.5)
    stats = {"cosine": torch.tensor([1.0, 0.5, 0.25, float("nan")])}
    assert policy.step({}, Evidence(1, 4, False, True, stats=stats))[0].tolist() == [True, True, False, False]
    assert policy.step({}, Evidence(0, 2, True, False, stats=stats))[0].tolist() == [False] * 4


def test_the_first_exit_needs_no_cosine():
    seen = Evidence(0, 2, True, False, hidden=torch.zeros(3, 4))
    assert offramp.policy("saturation", threshold=-1.0).step({}, seen)[0].tolist() == [False] * 3


def test_cosines_may_be_negative_and_not_above_one():
    assert offramp.policy("saturation", threshold=-1).threshold == -1.0
    with pytest.raises(offramp.OfframpError, match=r"1.01 is outside \[-1, 1\]"):
        offramp.policy("saturation", threshold=1.01)
