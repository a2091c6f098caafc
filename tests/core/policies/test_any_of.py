import torch

import offramp
from offramp.policy import Evidence


def test_stops_where_any_stops():
    policy = offramp.policy(
        "any_of", policies=[{"policy": "confidence", "threshold": 0.8}, {"policy": "patience", "patience": 1}]
    )
    state = policy.start(4, "cpu")
    rows = [([0.9, 0.1, 0.1, float("nan")], [1, 1, 1, 1]), ([0.1, 0.1, 0.9, 0.1], [2, 1, 2, 2])]
    masks = []
    for i, (top1, label) in enumerate(rows):
        seen = Evidence(i, i + 1, i == 0, i == 1, stats={"top1": torch.tensor(top1), "label": torch.tensor(label)})
        stop, state = policy.step(state, seen)
        masks.append(stop.tolist())
    assert masks == [[True, False, False, False], [False, True, True, False]]


def test_state_goes_on_where_another_policy_already_stopped_the_row():
    policy = offramp.policy("any_of", policies=[{"policy": "fixed", "depth": 1}, {"policy": "patience", "patience": 2}])
    state = policy.start(1, "cpu")
    for i in range(3):
        label = {"label": torch.tensor([7])}
        stop, state = policy.step(state, Evidence(i, i + 1, i == 0, i == 2, stats=label))
    assert stop.tolist() == [True] and state["1.count"].tolist() == [2]
