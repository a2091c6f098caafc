"""Exits by jointly trained gates, by hand."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.policy import Evidence


def first(gates, **options):
    """The first exit at which each row of gates [rows, exits] stops, -1 for none."""
    policy, gates = offramp.policy("jei", **options), torch.tensor(gates)
    state, out = policy.start(len(gates), "cpu"), torch.full((len(gates),), -1)
    for i, gate in enumerate(gates.unbind(1)):
        stop, state = policy.step(state, Evidence(i, i + 1, i == 0, False, stats={"jei": gate}))
        out = torch.where(stop & (out < 0), i, out)
    return out.tolist()


def test_the_first_activation_above_one_half_leaves():
    gates = [[0.2, 0.5, 0.6, 0.9], [0.1, 0.1, 0.1, 0.1], [0.6, 0.0, 0.0, 0.0]]
    assert first(gates) == [1, -1, 0]
    assert first(gates, threshold=0.7) == [2, -1, -1]
    assert first(gates, threshold=[0.2, 1.0, 1.0, 1.0]) == [0, -1, 0]


def test_the_sum_of_gates_counts_and_not_that_of_masses():
    """At the third exit 1 - 0.45 - 0.45 = 0.1 is left of the mass, and 0.3025 / 0.1 / ... of the rows."""
    policy = offramp.policy("jei")
    state = policy.start(1, "cpu")
    for i, gate in enumerate((0.45, 0.45)):
        _, state = policy.step(state, Evidence(i, i + 1, i == 0, False, stats={"jei": torch.tensor([gate])}))
    assert state["total"].item() == pytest.approx(0.9)
    assert state["survival"].item() == pytest.approx(1 - 0.9)


def test_single_divides_the_gate_itself():
    # after 0.4 a second gate of 0.7 is cut to 0.6 by the sum, 0.6 / 0.6 = 1; a third of 0.2 has no mass left
    assert first([[0.4, 0.7]], recursion="single", threshold=1.0) == [1]
    assert first([[0.4, 0.3, 0.4]], threshold=0.9) == [2]  # 0.3 / 0.3
    assert first([[0.4, 0.3, 0.2]], threshold=0.6, recursion="single") == [2]  # 0.2 / 0.3
    assert first([[0.4, 0.3, 0.1]], threshold=0.6, recursion="single") == [-1]  # 0.1 / 0.3


def test_a_row_with_nan_stays():
    assert first([[float("nan"), 1.0, 1.0], [0.1, float("nan"), 1.0], [0.1, 1.0, 1.0]]) == [-1, -1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"jei: threshold 0.0 is outside \]0, 1\]"),
        ({"threshold": 1.1}, "outside"),
        ({"recursion": "double"}, "recursion 'double' is not one of sum, single"),
    ],
)
def test_what_says_nothing(options, message):
    with pytest.raises(BadArgument, match=message):
        offramp.policy("jei", **options)


def test_three_thresholds_for_two_exits():
    with pytest.raises(BadArgument, match="3 thresholds for 2 exits"):
        offramp.policy("jei", threshold=[0.1, 0.2, 0.3]).check((2, 4))
