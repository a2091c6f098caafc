"""Exits where the prediction stands still, by hand: numbers, vectors, actions with a gripper."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.policy import Evidence


def first(predictions, **options):
    """The first exit at which each row of predictions [rows, exits, outputs] stops, -1 for none."""
    policy, predictions = offramp.policy("agreement", **options), torch.tensor(predictions)
    state, out = policy.start(len(predictions), "cpu"), torch.full((len(predictions),), -1)
    for i, said in enumerate(predictions.unbind(1)):
        stop, state = policy.step(state, Evidence(i, i + 1, i == 0, False, prediction=said))
        out = torch.where(stop & (out < 0), i, out)
    return out.tolist()


def test_numbers():
    rows = [[[1.0], [1.05], [2.0]], [[1.0], [2.0], [2.05]], [[0.0], [1.0], [2.0]]]
    assert first(rows, threshold=0.1) == [1, 2, -1]
    assert first(rows, threshold=[0.01, 0.01, 1.0]) == [2, 2, 2]


@pytest.mark.parametrize(
    ("distance", "value"), [("rms", (25 / 3) ** 0.5), ("mean", 7 / 3), ("max", 4.0), ("cosine", 1.0)]
)
def test_distances_by_hand(distance, value):
    rows = [[[0.0, 0.0, 0.0], [3.0, -4.0, 0.0]]]
    if distance == "cosine":
        rows = [[[0.0, 0.0, 1.0], [3.0, -4.0, 0.0]]]
    assert first(rows, distance=distance, threshold=value + 1e-4) == [1]
    assert first(rows, distance=distance, threshold=value - 1e-4) == [-1]


def test_a_gripper_that_opens_and_closes_is_left_out():
    rows = [[[0.1, 0.2, 1.0], [0.1, 0.2, -1.0]]]
    assert first(rows, threshold=0.01) == [-1]
    assert first(rows, threshold=0.01, outputs=[0, 1]) == [1]
    with pytest.raises(BadArgument, match="the prediction has 3"):
        first(rows, threshold=0.01, outputs=[3])


@pytest.mark.parametrize("distance", ["rms", "mean", "max", "cosine"])
def test_nan_is_near_to_nothing_before_it_and_after_it(distance):
    nan = float("nan")
    rows = [[[1.0, 1.0], [1.0, nan], [1.0, 1.0], [1.0, 1.0]]]
    assert first(rows, threshold=0.1, distance=distance) == [3]


def test_a_score_on_a_trace_knows_the_prediction_before():
    logits = torch.randn(6, 4, 3)
    trace = offramp.Trace((1, 2, 3, 4), {}, label=logits.argmax(-1), classes=3, logits=logits)
    policy = offramp.policy("agreement", threshold=0.5)
    rows = torch.arange(6)
    scores = [policy.score(trace.evidence(k, rows)) for k in range(3)]
    assert scores[0].isnan().all()
    for k in (1, 2):
        assert torch.allclose(scores[k], (logits[:, k] - logits[:, k - 1]).square().mean(-1).sqrt())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "agreement: threshold 0.0 is outside"),
        ({"threshold": 1.0, "distance": "city"}, "distance 'city' is not one of rms, mean, max, cosine"),
        ({"threshold": 1.0, "outputs": []}, "outputs=.. must be a list of places"),
        ({"threshold": 1.0, "outputs": [-1]}, "whole numbers from 0 on"),
    ],
)
def test_what_says_nothing(options, message):
    with pytest.raises(BadArgument, match=message):
        offramp.policy("agreement", **options)


def test_one_exit_has_nothing_to_compare_with():
    with pytest.raises(BadArgument, match="could never fire; attach more exits"):
        offramp.policy("agreement", threshold=0.5).check((3,))
