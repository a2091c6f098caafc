"""The gate's loss: both answers weigh alike, however rare one of them is."""

import pytest
import torch
from torch.nn.functional import softplus

import offramp
from offramp._registry import create
from offramp.errors import BadArgument


def loss(odds, agrees):
    targets = torch.tensor(agrees)[:, None]
    return create(offramp.Loss, "gate").each([torch.tensor(odds)], torch.zeros(len(odds), 3), targets)[0]


def test_each_answer_weighs_half():
    found = loss([2.0, 1.0, 0.0, -1.0], [True, True, True, False])
    yes, no = softplus(-torch.tensor([2.0, 1.0, 0.0])).mean(), softplus(torch.tensor(-1.0))
    assert found.item() == pytest.approx(float(yes + no) / 2)


@pytest.mark.parametrize("answer", [True, False])
def test_where_one_answer_does_not_occur_the_other_counts(answer):
    found = loss([2.0, -1.0], [answer, answer])
    wanted = softplus(torch.tensor([-2.0, 1.0]) if answer else torch.tensor([2.0, -1.0])).mean()
    assert found.item() == pytest.approx(float(wanted))


def test_exits_are_averaged():
    odds, agrees = torch.randn(9, 3), torch.rand(9, 3) > 0.4
    made = create(offramp.Loss, "gate")
    parts = made.each(odds.unbind(1), torch.zeros(9, 3), agrees)
    whole = made(odds.unbind(1), torch.zeros(9, 3), agrees)
    assert whole.item() == pytest.approx(float(torch.stack(parts).mean()))


def test_labels_are_no_targets_for_it():
    with pytest.raises(BadArgument, match="fit.model, data, loss=\"gate\". makes them"):
        create(offramp.Loss, "gate").each([torch.zeros(2)], torch.zeros(2, 3), torch.tensor([0, 1]))
