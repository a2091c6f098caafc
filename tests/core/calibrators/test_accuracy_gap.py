"""The accuracy gap, on average and by every exit: by hand, against a replay, and the promise over a thousand draws."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import binom

import offramp
from offramp import Trace
from offramp.calibrators.accuracy_gap import confirm, propose
from offramp.errors import BadArgument
from offramp.pvalues import binomial_p
from offramp.risks import losses
from offramp.simulate import exit_columns
from offramp.testing.calibrators import check_calibrator, toy_trace

ALPHA, DELTA, TRIALS = 0.03, 0.1, 1000


def test_the_average_is_the_fixed_sequence_on_its_own_risk():
    trace = toy_trace()
    gap = offramp.calibrate(trace, "confidence", method="accuracy_gap", alpha=0.1)
    same = offramp.calibrate(trace, "confidence", risk="accuracy_drop", alpha=0.1)
    assert gap == same and gap.certificate.risk == "accuracy_drop"


def p_value(mean, n):
    return binomial_p(round(mean * n), n, 0.1)


def test_proposals_by_hand():
    """Two exits, three rungs, 40 rows: at the first exit rung 0 stops 30 rows without a loss, rung 1 ten that all err.

    Of the 10 left, the second exit stops 5 at rung 0 and 5 at rung 2, none of which errs.
    """
    rungs = np.array([[0] * 30 + [1] * 10, [3] * 30 + [0] * 5 + [2] * 5])
    cost = np.zeros((2, 40))
    cost[0, 30:] = 1
    assert propose(rungs, cost, 3, 0.05, p_value) == {0: 0, 1: 2}
    assert p_value(0, 30) <= 0.05 < p_value(0, 28)
    assert propose(rungs[:, :28], cost[:, :28], 3, 0.05, p_value) == {}


def test_exits_open_from_the_deepest_on_until_one_fails():
    """The middle one's rows err, so it fails, and the first, which would pass, is not asked any more."""
    rungs = np.array([[0] * 40 + [1] * 60, [0] * 60 + [1] * 40, [0] * 100])
    cost = np.zeros((3, 100))
    cost[1, :60] = 1
    opened, p = confirm(rungs, cost, {0: 0, 1: 0, 2: 0}, 0.05, p_value)
    assert opened == {2: 0} and p == pytest.approx(0.9**100)
    cost[1] = 0
    opened, p = confirm(rungs, cost, {0: 0, 1: 0, 2: 0}, 0.05, p_value)
    assert opened == {2: 0, 1: 0, 0: 0} and p == pytest.approx(0.9**40)


def test_an_opened_exit_is_tested_again_at_every_deeper_one():
    """Rows that leave by the deep exit are fine as long as the early one is closed; opened, it hands over errors."""
    rungs = np.array([[0] * 50 + [1] * 50, [0] * 100])
    cost = np.zeros((2, 100))
    cost[0, :12] = 1
    assert binom.cdf(12, 50, 0.1) > 0.05
    assert confirm(rungs, cost, {0: 0, 1: 0}, 0.05, p_value)[0] == {1: 0}


def test_a_proposed_exit_where_nobody_leaves_fails():
    rungs = np.array([[1] * 100])
    assert confirm(rungs, np.zeros((1, 100)), {0: 0}, 0.05, p_value)[0] == {}


@pytest.mark.parametrize("risk", ["accuracy_drop", "disagreement", "excess_loss"])
def test_the_rows_that_left_by_each_exit_keep_the_bound_in_a_replay(risk):
    trace = toy_trace(2000)
    cal = offramp.calibrate(trace, "entropy", method="accuracy_gap", conditional=True, risk=risk)
    columns = exit_columns(trace, cal.policy)
    cost, left = losses(trace, columns, risk), columns.numpy()
    assert cal.certificate.n == 1000 and cal.certificate.test.endswith("by every exit")
    assert offramp.simulate(trace, cal).saved > 0.2
    assert max(cost[left <= k].mean() for k in range(4) if (left <= k).any()) <= 0.05
    by_depth = dict(cal.certificate.order)
    threshold = dict(zip(trace.depths, getattr(cal.policy, "inner", cal.policy).threshold, strict=False))
    assert all(threshold[d] == t for d, t in by_depth.items())


def test_the_contract_holds_by_every_exit_too():
    from offramp.calibrators.accuracy_gap import AccuracyGap

    check_calibrator(AccuracyGap(conditional=True), toy_trace(1000), risk="accuracy_drop")


def test_the_average_hides_what_one_exit_does():
    """The first exit is always wrong and sure of 2 % of the rows: the average allows that, the other bound does not."""
    n = 2000
    bad = torch.arange(n) % 50 == 0
    top1 = torch.stack([torch.where(bad, 0.99, 0.1), torch.full((n,), 0.99), torch.ones(n)], 1)
    label = torch.tensor([[1, 0, 0]]).repeat(n, 1)
    trace = Trace((1, 2, 3), {"top1": top1}, label, 2)
    given = {"method": "accuracy_gap", "risk": "disagreement", "alpha": 0.05}
    average = offramp.calibrate(trace, "confidence", **given)
    by_exit = offramp.calibrate(trace, "confidence", conditional=True, **given)
    assert (exit_columns(trace, average.policy) == 0).sum() == bad.sum()
    assert (exit_columns(trace, by_exit.policy) == 1).all() and by_exit.policy.closed == (1,)


def test_rows_without_a_label_are_no_evidence():
    more = toy_trace(1200)
    some = torch.where(torch.arange(1200) < 1000, more.targets, -100)
    half = Trace(more.depths, more.stats, more.label, 5, targets=some)
    cal = offramp.calibrate(half, "confidence", method="accuracy_gap", conditional=True)
    assert cal.certificate.n == 500


@pytest.mark.parametrize(
    ("rows", "alpha", "message"),
    [(100, 0.05, "At least 118 rows are needed.*these are 100"), (300, 0.015, "are needed")],
)
def test_too_few_rows_say_how_many(rows, alpha, message):
    cal = offramp.calibrate(toy_trace(rows), "confidence", method="accuracy_gap", conditional=True, alpha=alpha)
    assert cal.certificate is None and cal.policy.name == "never"
    assert re.search(message, cal.note)


def test_heads_that_err_say_so():
    n = 400
    label = torch.stack([torch.ones(n), torch.zeros(n)], 1).long()
    trace = Trace((1, 2), {"top1": torch.full((n, 2), 0.9)}, label, 2)
    cal = offramp.calibrate(trace, "confidence", method="accuracy_gap", conditional=True, risk="disagreement")
    assert "No threshold came near it" in cal.note


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("confidence", {"conditional": 1}, "True or False, not 1"),
        ("confidence", {"seed": -1}, "whole number from 0"),
        ("patience", {"conditional": True}, "Patience has none"),
    ],
)
def test_what_does_not_fit_is_refused(policy, options, message):
    with pytest.raises(BadArgument, match=message):
        offramp.calibrate(toy_trace(), policy, method="accuracy_gap", **options)


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [False, True])
def test_the_promise_on_real_rows(digits, draws, conditional):
    """1,000 draws of 600 rows of digits; the risk of what was found is known: it is that on all of them."""
    broken, saved = 0, []
    for trace in draws(TRIALS, 600):
        cal = offramp.calibrate(
            trace,
            "confidence",
            method="accuracy_gap",
            conditional=conditional,
            risk="disagreement",
            alpha=ALPHA,
            delta=DELTA,
        )
        columns = exit_columns(digits, cal.policy)
        cost, left = losses(digits, columns, "disagreement"), columns.numpy()
        sets = [left <= k for k in range(4)] if conditional else [left <= 3]
        broken += max(cost[s].mean() for s in sets if s.any()) > ALPHA
        saved.append(offramp.simulate(digits, cal).saved)
    assert broken / TRIALS <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / TRIALS)
    assert np.mean(saved) > (0.2 if conditional else 0.5)
