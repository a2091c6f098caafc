import math

import pytest
import torch

import offramp
from offramp.policy import Evidence


def seen(entropy, classes=8):
    return Evidence(0, 2, True, True, classes=classes, stats={"entropy": torch.tensor(entropy)})


def test_stops_strictly_below_the_threshold_in_nats():
    stop, _ = offramp.policy("entropy", threshold=0.5).step({}, seen([0.25, 0.5, 0.75, float("nan")]))
    assert stop.tolist() == [True, False, False, False]


def test_normalised_is_a_fraction_of_the_log_of_the_classes():
    policy = offramp.policy("entropy", threshold=0.5, normalised=True)
    half = 0.5 * math.log(8)  # 1.0397 nats: above 0.5 nats, so the plain threshold would not stop it
    stop, _ = policy.step({}, seen([half - 0.01, half + 0.01]))
    assert stop.tolist() == [True, False]


def test_normalised_needs_classes():
    with pytest.raises(offramp.OfframpError, match="over 0 classes"):
        offramp.policy("entropy", threshold=0.5, normalised=True).step({}, seen([0.1], classes=0))


def test_normalised_threshold_is_at_most_one():
    assert offramp.policy("entropy", threshold=2.0).threshold == 2.0
    with pytest.raises(offramp.OfframpError, match=r"outside \]0, 1\]"):
        offramp.policy("entropy", threshold=2.0, normalised=True)


def test_ladder_ascends_to_the_largest_entropy():
    rungs = [p.threshold for p in offramp.policy("entropy", threshold=1.0).ladder((2, 4), 8)]
    assert rungs == sorted(set(rungs)) and 0 < rungs[0] < 0.001 and rungs[-1] == pytest.approx(math.log(8))
    parts = offramp.policy("entropy", threshold=0.3, normalised=True).ladder((2, 4), 8)
    assert all(p.normalised for p in parts)
    assert [p.threshold * math.log(8) for p in parts] == pytest.approx(rungs)
