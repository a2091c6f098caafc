import math

import pytest
import torch

import offramp
from offramp._registry import create
from offramp.loss import Loss

LOGITS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()


def test_cross_entropy_with_the_labels_and_not_with_the_model():
    found = create(Loss, "labels")([LOGITS], -LOGITS, torch.tensor([0, 1, 1]))
    assert float(found) == pytest.approx(-(math.log(0.5) + math.log(0.8) + math.log(0.2)) / 3, rel=1e-5)


def test_rows_marked_minus_100_are_left_out():
    found = create(Loss, "labels")([LOGITS], LOGITS, torch.tensor([0, -100, 1]))
    assert float(found) == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2, rel=1e-5)


def test_without_any_label_it_is_zero_and_not_nan():
    assert float(create(Loss, "labels")([LOGITS], LOGITS, torch.full((3,), -100))) == 0.0


def test_without_targets_it_says_what_to_do():
    with pytest.raises(offramp.OfframpError, match='needs labels.*loss="distill"'):
        create(Loss, "labels")([LOGITS], LOGITS, None)


def test_an_unknown_weighting_is_refused_at_once():
    with pytest.raises(offramp.OfframpError, match="did you mean 'inverse'"):
        create(Loss, "labels", weighting="invers")
