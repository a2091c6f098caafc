"""Windows around operating points, by hand, for three tasks; and what they are for: the same point at less cost."""

import numpy as np
import pytest
import torch

import offramp
from offramp import Trace
from offramp.errors import BadArgument
from offramp.testing.calibrators import toy_trace


def ranked(n=100, targets=None):
    """One exit; row i has confidence (i + 1) / n and is wrong for the first 20 rows, where it is least sure."""
    top1 = torch.stack([torch.arange(1, n + 1) / n, torch.ones(n)], 1)
    label = torch.stack([(torch.arange(n) < 20).long(), torch.zeros(n, dtype=torch.long)], 1)
    return Trace((1, 2), {"top1": top1, "entropy": 1 - top1}, label, 2, targets=targets)


def window(trace, policy="confidence", **given):
    found = offramp.calibrate(trace, policy, method="window_fit", **given).policy
    return round(found.low[0], 4), round(found.high[0], 4)


def test_coverage_by_hand():
    """80 % are accepted from .21 on; a tenth of the rows on either side of it is .11 to .31, up to a row."""
    low, high = window(ranked(), coverage=0.8)
    assert low == pytest.approx(0.11, abs=0.011) and high == pytest.approx(0.31, abs=0.011)
    assert window(ranked()) == (low, high)  # the default
    assert window(ranked(), coverage=0.95)[0] == 0.01  # the rank is cut off at 0


def test_error_by_hand():
    """The 80 surest rows are right; with 4 % errors allowed, three more are taken: 3 / 83 = 3.6 %, 4 / 84 = 4.8 %."""
    low, high = window(ranked(), error=0.04)
    assert (low + high) / 2 == pytest.approx(0.18, abs=0.011)


def test_a_score_that_is_sure_when_low_gives_the_mirrored_window():
    low, high = window(ranked(), coverage=0.8)
    assert window(ranked(), "entropy", coverage=0.8) == pytest.approx((1 - high, 1 - low))


def test_rows_from_elsewhere_do_not_move_the_point_but_may_move_the_ranks():
    """A second hundred rows without a label, all with little confidence: half of the traffic."""
    here = ranked(200, torch.where(torch.arange(200) < 100, -100, torch.arange(200) % 2))
    plain, mixed = window(here, task="ood", tpr=0.9), window(here, task="ood", tpr=0.9, mixed=True)
    assert sum(plain) / 2 == pytest.approx(0.55, abs=0.01) and sum(mixed) / 2 == pytest.approx(0.55, abs=0.01)
    assert mixed[1] - mixed[0] == pytest.approx(0.2, abs=0.02)  # of 200 rows
    assert plain[1] - plain[0] == pytest.approx(0.1, abs=0.02)  # of 100


def test_both_counts_rows_from_elsewhere_as_errors():
    """Rows 0 to 99 are from elsewhere; the others are right. An error of 20 % takes 25 of the former: from .38 on."""
    targets = torch.where(torch.arange(200) < 100, -100, 0)
    targets[-1] = 1
    trace = ranked(200, targets)
    low, high = window(trace, task="both", error=0.2)
    assert (low + high) / 2 == pytest.approx((100 - 24) / 200, abs=0.02)


def test_an_exit_without_scores_stays_closed():
    cal = offramp.calibrate(toy_trace(), "saturation", method="window_fit")
    assert not (offramp.simulate(toy_trace(), cal).columns == 0).any()


def test_the_point_of_the_full_model_at_a_third_of_its_cost(digits):
    """Selective classification at 80 % coverage: deferring the 20 % around the point recovers most of what the full
    model wins over the exit. Deferring the least sure 20 %, as a threshold does, costs as much and wins less."""
    trace = toy_trace(20_000)
    two = Trace((1, 2), {"top1": trace.stats["top1"][:, [0, 3]]}, trace.label[:, [0, 3]], 5, targets=trace.targets)
    fit, test = two[::2], two[1::2]

    def errors(policy):
        out = offramp.simulate(test, policy)
        score = test.stats["top1"].gather(1, out.columns[:, None]).squeeze(1)
        kept = score.argsort(descending=True)[: int(0.8 * len(test))]
        return float((out.labels != test.targets)[kept].double().mean()), out.cost_mean

    cal = offramp.calibrate(fit, "confidence", method="window_fit", coverage=0.8)
    least = float(np.quantile(fit.stats["top1"][:, 0], 0.2))
    alone, full = errors(offramp.policy("fixed", depth=1)), errors(offramp.policy("never"))
    near, below = errors(cal), errors(offramp.policy("confidence", threshold=least))
    assert near[1] == pytest.approx(1.2, abs=0.02) and below[1] == pytest.approx(1.2, abs=0.02)
    assert full[0] <= near[0] < alone[0] and near[0] < below[0] + 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "reject"}, "choose one of selective, ood, both"),
        ({"coverage": 0.8, "error": 0.1}, "one operating point, and coverage, error"),
        ({"task": "ood", "error": 0.1}, "not for task ood"),
        ({"coverage": 1.0}, "coverage=1.0 must be a share"),
        ({"width": 0}, "width=0 must be a share"),
        ({"mixed": 1}, "True or False"),
        ({"error": 0.0001, "task": "both"}, "error=0.0001 is met by no share"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    targets = torch.where(torch.arange(100) > 80, -100, torch.arange(100) % 2)
    with pytest.raises(BadArgument, match=message):
        window(ranked(100, targets), **given)
