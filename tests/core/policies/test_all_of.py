import torch

import offramp
from offramp.policy import Evidence


def seen(i, top1, label):
    return Evidence(i, i + 1, i == 0, i == 2, stats={"top1": torch.tensor(top1), "label": torch.tensor(label)})


def both():
    return offramp.policy(
        "all_of", policies=[offramp.policy("confidence", threshold=0.5), {"policy": "patience", "patience": 1}]
    )


def test_stops_only_where_all_stop():
    policy = both()
    state = policy.start(3, "cpu")
    stop, state = policy.step(state, seen(0, [0.9, 0.9, 0.1], [1, 1, 1]))
    assert stop.tolist() == [False, False, False]  # nobody has been patient yet
    stop, state = policy.step(state, seen(1, [0.9, 0.9, 0.1], [1, 2, 1]))
    assert stop.tolist() == [True, False, False]  # sure and patient; sure; patient


def test_states_are_kept_apart_and_batch_first():
    policy = offramp.policy("all_of", policies=[{"policy": "patience", "patience": p} for p in (1, 2)])
    state = policy.start(4, "cpu")
    assert sorted(state) == ["0.count", "0.label", "1.count", "1.label"]
    assert all(len(v) == 4 for v in state.values())


def test_eleven_policies_do_not_mix_their_states():
    """'1.' must not be taken for the start of '10.'."""
    policy = offramp.policy("all_of", policies=[{"policy": "patience", "patience": 1}] * 11)
    state = policy.start(1, "cpu")
    for i in range(2):
        stop, state = policy.step(state, seen(i, [0.5], [3]))
    assert stop.tolist() == [True] and len(state) == 22 and state["10.count"].tolist() == [1]


def test_statistics_are_the_union():
    assert both().statistics() == {"top1", "label"}


def test_check_reaches_every_policy():
    import pytest

    with pytest.raises(offramp.OfframpError, match="could never fire"):
        both().check((2,))
