import pytest
import torch

import offramp
from offramp.policy import Evidence


def test_no_row_stops_whatever_the_evidence():
    seen = Evidence(0, 2, True, True, stats={"top1": torch.tensor([1.0, 0.5, float("nan")])})
    stop, state = offramp.policy("never").step({}, seen)
    assert stop.tolist() == [False] * 3 and state == {}


def test_it_needs_only_one_tensor_to_know_the_rows():
    stop, _ = offramp.policy("never").step({}, Evidence(0, 2, True, True, hidden=torch.zeros(2, 5)))
    assert stop.tolist() == [False, False]
    with pytest.raises(offramp.OfframpError, match="no tensor at all"):
        offramp.policy("never").step({}, Evidence(0, 2, True, True))


def test_it_asks_for_nothing():
    assert offramp.policy("never").statistics() == frozenset()
