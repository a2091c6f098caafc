import pytest
import torch

import offramp
from offramp.policy import Evidence


def seen(logits, index=0):
    raw = {"top1": torch.full((len(logits),), 0.123)}  # what the uncalibrated head said: must not be used
    return Evidence(index, 2, index == 0, False, prediction=torch.tensor(logits), stats=raw)


def test_the_inner_policy_sees_softened_probabilities():
    logits = [[2.0, 0.0], [4.0, 0.0]]  # top-1 at T = 1: .881, .982; at T = 2: .731, .881
    at = {
        t: offramp.policy("tempered", inner={"policy": "confidence", "threshold": 0.88}, temperature=t) for t in (1, 2)
    }
    assert at[1].step({}, seen(logits))[0].tolist() == [True, True]
    assert at[2].step({}, seen(logits))[0].tolist() == [False, True]


def test_one_temperature_per_exit():
    policy = offramp.policy("tempered", inner={"policy": "confidence", "threshold": 0.8}, temperature=[1.0, 2.0])
    assert [policy.step({}, seen([[2.0, 0.0]], i))[0].item() for i in range(2)] == [True, False]
    with pytest.raises(offramp.OfframpError, match="2 temperatures for 3 exits"):
        policy.check((2, 4, 6))


def test_labels_and_cosines_are_left_alone():
    inner = {
        "policy": "all_of",
        "policies": [{"policy": "patience", "patience": 1}, {"policy": "saturation", "threshold": 0.5}],
    }
    policy = offramp.policy("tempered", inner=inner, temperature=3.0)
    assert policy.statistics() == {"prediction", "label", "cosine"}
    state = policy.start(1, "cpu")
    for i in range(2):
        found = Evidence(
            i, i + 1, i == 0, i == 1, prediction=torch.tensor([[0.0, 1.0]]), stats={"cosine": torch.tensor([0.9])}
        )
        stop, state = policy.step(state, found)
    assert stop.item() and state["0.label"].item() == 1


def test_without_logits_it_says_so():
    policy = offramp.policy("tempered", inner={"policy": "confidence", "threshold": 0.8}, temperature=2.0)
    with pytest.raises(offramp.OfframpError, match="needs the logits"):
        policy.step({}, Evidence(0, 2, True, True, stats={"top1": torch.tensor([0.9])}))
