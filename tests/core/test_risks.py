"""What leaving early costs each row, by hand."""

import pytest
import torch

import offramp
from offramp import Trace
from offramp.risks import RISKS, losses

NAN = float("nan")


def trace(**more):
    """Three rows, one exit at 2 of 4 blocks."""
    return Trace((2, 4), {}, torch.tensor([[1, 1], [0, 1], [2, 0]]), 3, **more)


EARLY, LATE = torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])


def test_disagreement():
    assert losses(trace(), EARLY, "disagreement").tolist() == [0, 1, 1]
    assert losses(trace(), torch.tensor([0, 1, 0]), "disagreement").tolist() == [0, 0, 1]


def test_accuracy_drop_counts_what_the_exit_spoils_and_not_what_it_mends():
    found = losses(trace(targets=torch.tensor([1, 1, 2])), EARLY, "accuracy_drop")
    assert found.tolist() == [0, 1, 0]  # same; full right, early wrong; early right, full wrong


def test_rows_without_a_label_do_not_water_the_risk_down():
    assert losses(trace(targets=torch.tensor([-100, 1, -100])), EARLY, "accuracy_drop").tolist() == [1]
    table = torch.tensor([[0.0, 0.0], [0.5, 0.25], [0.0, 0.0]])
    found = losses(trace(targets=torch.tensor([-100, 1, -100]), losses=table), EARLY, "excess_loss")
    assert found.tolist() == [0.25]


def test_excess_loss_is_clipped_row_by_row():
    """Unclipped, the mean of -2, 0.25 and 5 would be 1.08, and clipping that mean would hide two thirds of it."""
    table = torch.tensor([[1.0, 3.0], [0.75, 0.5], [6.0, 1.0]])
    assert losses(trace(losses=table), EARLY, "excess_loss").tolist() == [0, 0.25, 1]


def test_excess_loss_of_nan_is_the_worst_and_of_the_full_model_nothing():
    table = torch.tensor([[NAN, 1.0], [1.0, NAN], [float("inf"), 1.0]])
    assert losses(trace(losses=table), EARLY, "excess_loss").tolist() == [1, 1, 1]
    assert losses(trace(losses=table), LATE, "excess_loss").tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", sorted(RISKS))
def test_the_full_model_has_no_risk(name):
    full = trace(targets=torch.tensor([1, 0, 2]), losses=torch.rand(3, 2))
    assert losses(full, LATE, name).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("name", "needs"), [("accuracy_drop", "needs labels"), ("excess_loss", "needs task losses")])
def test_what_is_missing_is_named(name, needs):
    with pytest.raises(offramp.OfframpError, match=needs):
        losses(trace(), EARLY, name)


def test_unknown_risk():
    with pytest.raises(offramp.OfframpError, match="did you mean 'disagreement'"):
        losses(trace(), EARLY, "disagrement")
