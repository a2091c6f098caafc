"""PABEE's counter, by hand: exit when the answer has stayed the same `patience` times in a row."""

import pytest
import torch

import offramp
from offramp.policy import Evidence

# one row each: settled from the start, changes once, changes always, agrees at the end only, agrees twice with a break
ANSWERS = torch.tensor([[3, 3, 3, 3], [1, 3, 3, 3], [1, 2, 1, 2], [0, 1, 2, 2], [1, 1, 2, 2]])


def exits(patience, answers=ANSWERS, **more):
    """The first exit at which each row stops, 4 for none."""
    policy = offramp.policy("patience", patience=patience)
    state, out = policy.start(len(answers), "cpu"), [answers.shape[1]] * len(answers)
    for i in range(answers.shape[1]):
        extra = {k: v[:, i] for k, v in more.items()}
        stats = {"label": answers[:, i], **{k: v for k, v in extra.items() if k != "prediction"}}
        seen = Evidence(i, i + 1, i == 0, i == 3, prediction=extra.get("prediction"), stats=stats)
        stop, state = policy.step(state, seen)
        out = [min(o, i) if s else o for o, s in zip(out, stop.tolist(), strict=True)]
    return out


@pytest.mark.parametrize(("patience", "expected"), [(1, [1, 2, 4, 3, 1]), (2, [2, 3, 4, 4, 4]), (3, [3, 4, 4, 4, 4])])
def test_earliest_exit_is_the_patience(patience, expected):
    assert exits(patience) == expected


def test_rows_count_by_themselves():
    """The reference implementation waits until the whole batch agrees; here row 2 holds nobody back."""
    assert exits(1)[0] == 1 == exits(1, ANSWERS[:1])[0]


@pytest.mark.parametrize("form", ["top1", "prediction"])
def test_answers_read_from_nan_agree_with_nothing(form):
    answers = torch.zeros(2, 4, dtype=torch.long)
    top1 = torch.full((2, 4), 0.9)
    top1[1, 1] = float("nan")
    logits = torch.tensor([1.0, 0.0]).expand(2, 4, 2).clone()
    logits[1, 1, 0] = float("nan")
    more = {"top1": top1} if form == "top1" else {"prediction": logits}
    assert exits(1, answers, **more) == [1, 3]  # the NaN breaks the agreement before it and after it
    assert exits(1, answers) == [1, 1]


def test_a_patience_that_can_never_fire_is_refused():
    offramp.policy("patience", patience=2).check((2, 4, 6))
    with pytest.raises(offramp.OfframpError, match="need at least 4 exits, and there are 3"):
        offramp.policy("patience", patience=3).check((2, 4, 6))


def test_ladder_is_every_patience_that_can_fire():
    assert [p.patience for p in offramp.policy("patience", patience=1).ladder((2, 4, 6, 8), 7)] == [3, 2, 1]
    with pytest.raises(offramp.OfframpError, match="there are 1"):
        offramp.policy("patience", patience=1).ladder((2,), 7)


def numbers(values, **options):
    """The first exit at which each row of values [rows, exits, outputs] stops, -1 for none."""
    policy, values = offramp.policy("patience", **options), torch.tensor(values)
    state, out = policy.start(len(values), "cpu"), torch.full((len(values),), -1)
    for i, said in enumerate(values.unbind(1)):
        stop, state = policy.step(state, Evidence(i, i + 1, i == 0, False, prediction=said))
        out = torch.where(stop & (out < 0), i, out)
    return out.tolist()


def test_numbers_agree_within_the_tolerance():
    rows = [[[1.0], [1.05], [1.1], [2.0]], [[1.0], [1.2], [1.25], [1.3]], [[0.0], [1.0], [2.0], [3.0]]]
    assert numbers(rows, patience=1, tolerance=0.1) == [1, 2, -1]
    assert numbers(rows, patience=2, tolerance=0.1) == [2, 3, -1]
    assert numbers([[[1.0], [1.5]]], patience=1, tolerance=0.5) == [-1]  # strictly less


def test_every_output_must_agree_and_nan_never_does():
    assert numbers([[[1.0, 1.0], [1.0, 2.0], [1.0, 2.0]]], patience=1, tolerance=0.1) == [2]
    assert numbers([[[1.0], [float("nan")], [1.0], [1.0]]], patience=1, tolerance=0.1) == [3]


@pytest.mark.parametrize("tolerance", [0, -0.1, float("nan"), float("inf"), "small", True])
def test_a_tolerance_that_says_nothing(tolerance):
    with pytest.raises(offramp.OfframpError, match="tolerance must be a change above 0"):
        offramp.policy("patience", patience=1, tolerance=tolerance)
