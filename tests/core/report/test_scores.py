"""What a trace says about each exit: AUROC and calibration error against scikit-learn and by hand, and confusion."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from offramp import Trace
from offramp.kernels.confidence import confidence
from offramp.report.scores import auroc, calibration_error, confusion, exit_scores


def test_auroc_is_that_of_scikit_learn_also_with_ties():
    score = (torch.rand(500) * 10).round() / 10
    positive = torch.rand(500) < score
    assert auroc(score, positive) == pytest.approx(roc_auc_score(positive.numpy(), score.numpy()), abs=1e-12)


def test_auroc_of_one_kind_of_row_is_none_and_rows_without_a_score_do_not_count():
    nan = float("nan")
    assert auroc(torch.rand(5), torch.ones(5, dtype=torch.bool)) is None
    assert auroc(torch.tensor([0.1, 0.9, nan]), torch.tensor([False, True, True])) == 1.0
    assert auroc(torch.tensor([nan, nan]), torch.tensor([False, True])) is None


def test_calibration_error_by_hand():
    """Two bins of 15: 0.05 right once of two, 0.95 right once of one."""
    p, right = torch.tensor([0.05, 0.05, 0.95], dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0])
    assert calibration_error(p, right) == pytest.approx(2 / 3 * (0.5 - 0.05) + 1 / 3 * 0.05)
    assert calibration_error(torch.tensor([1.0]), torch.tensor([1.0])) == 0.0
    assert calibration_error(torch.tensor([float("nan")]), torch.tensor([1.0])) is None


def table(targets=None):
    """Four rows, an exit and the full model; the exit says 0 0 1 1, the full model 0 1 1 1."""
    label = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]])
    top1 = torch.tensor([[0.9, 0.9], [0.4, 0.9], [0.8, 0.9], [0.7, 0.9]])
    entropy = 1 - top1
    return Trace((2, 4), {"top1": top1, "entropy": entropy}, label, classes=2, targets=targets)


def test_every_exit_is_told_with_its_accuracy_and_who_was_right():
    trace = table(torch.tensor([0, 0, 1, -100]))
    first, full = exit_scores(trace)
    assert (first["depth"], first["agreement"], first["accuracy"]) == (2, 0.75, 1.0)
    assert first["auroc"] == {"entropy": 1.0, "top1": 1.0}  # the one row that differs is the least sure
    assert full["agreement"] == 1.0 and full["accuracy"] == pytest.approx(2 / 3) and full["auroc"] == {}
    found = confusion(trace)
    assert found["same"] == [[1.0, 0.75], [0.75, 1.0]]
    (one,) = found["outcomes"]
    assert one["both"] == pytest.approx(2 / 3) and one["only_exit"] == pytest.approx(1 / 3)
    assert one["only_full"] == one["neither"] == 0.0


def test_without_labels_agreement_is_the_truth():
    first, _ = exit_scores(table())
    assert first["accuracy"] is None
    assert first["ece"] == pytest.approx((0.1 + 0.4 + 0.2 + 0.3) / 4, abs=1e-6)
    assert "outcomes" not in confusion(table())


@pytest.mark.parametrize("statistic", ["entropy", "sharpened", "energy", "top1", "margin"])
def test_what_falls_with_sureness_is_turned(statistic):
    """Of logits that only differ in how sure they are, every statistic tells which row agrees."""
    logits = torch.stack([torch.eye(4)[:2] * scale for scale in (6.0, 1.0)]).flatten(0, 1)
    logits = torch.stack([logits, torch.eye(4)[[0, 1, 2, 3]] * 6], 1)
    found = [confidence(z, {"label", statistic}) for z in logits.unbind(1)]
    stats = {statistic: torch.stack([f[statistic] for f in found], 1)}
    trace = Trace((1, 2), stats, torch.stack([f["label"] for f in found], 1), 4)
    assert exit_scores(trace)[0]["auroc"] == {statistic: 1.0}
