import torch

import offramp
from offramp.policy import Evidence


def seen(index=0, margin=(0.95, 0.9, 0.8999, float("nan"))):
    return Evidence(index, 2 * index + 2, index == 0, index == 2, stats={"margin": torch.tensor(margin)})


def test_stops_at_or_above_the_threshold():
    stop, _ = offramp.policy("margin", threshold=0.9).step({}, seen())
    assert stop.tolist() == [True, True, False, False]  # equal stops, NaN does not


def test_one_threshold_per_exit():
    policy = offramp.policy("margin", threshold=[0.99, 0.9, 0.0])
    assert [policy.step({}, seen(i))[0].tolist() for i in range(3)] == [
        [False, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
    ]


def test_the_ends_of_the_range():
    assert offramp.policy("margin", threshold=1).step({}, seen(margin=(1.0, 0.999)))[0].tolist() == [True, False]
    assert offramp.policy("margin", threshold=0).step({}, seen(margin=(0.0, 0.5)))[0].tolist() == [True, True]


def test_the_score_is_the_lead_and_not_the_top():
    """0.6 against 0.39 is a confident answer with a small lead."""
    logits = torch.tensor([[0.6, 0.39, 0.01], [0.5, 0.25, 0.25]]).log()
    stats = offramp.policy("margin", threshold=0.22)
    from offramp.kernels.confidence import confidence

    found = Evidence(0, 2, True, True, prediction=logits, stats=confidence(logits, stats.statistics()))
    assert stats.step({}, found)[0].tolist() == [False, True]
