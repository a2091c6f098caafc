"""Learn-then-Test: the walk by hand, and the promise itself, checked on a population whose risk is known exactly."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

import offramp
from offramp import Trace
from offramp._registry import lookup
from offramp.calibrators._walk import _all_at_once
from offramp.policy import UNIT_GRID, ExitPolicy
from offramp.risks import losses
from offramp.simulate import exit_columns
from offramp.testing.calibrators import toy_trace


def one_exit(top1, wrong, **more):
    """A trace with one exit: its confidence, and whether it disagrees with the full model."""
    n = len(top1)
    label = torch.stack([torch.as_tensor(wrong).long(), torch.zeros(n, dtype=torch.long)], 1)
    table = torch.stack([torch.as_tensor(top1, dtype=torch.float32), torch.ones(n)], 1)
    return Trace((1, 2), {"top1": table}, label, 2, **more)


def test_the_walk_by_hand():
    """100 rows at .95 that agree, 20 at .855 of which 10 do not: with alpha .05, n 120, the walk ends before .85."""
    trace = one_exit([0.95] * 100 + [0.855] * 20, [0] * 110 + [1] * 10, model_hash="m")
    cal = offramp.calibrate(trace, "confidence", alpha=0.05, delta=0.05)
    assert cal.policy == offramp.policy("confidence", threshold=0.86)
    certificate = cal.certificate
    assert certificate.p_value == pytest.approx(0.95**120)  # no loss at .86
    assert binom.cdf(10, 120, 0.05) > 0.05  # ten at .85
    assert (certificate.risk, certificate.alpha, certificate.delta, certificate.n) == ("disagreement", 0.05, 0.05, 120)
    assert certificate.test == "binomial" and certificate.order == UNIT_GRID
    assert certificate.data_hash == trace.data_hash and certificate.model_hash == "m"


def test_it_stops_at_the_first_failure_though_a_bolder_rung_would_pass():
    """The bold exit agrees everywhere, the one in between does not; only what lies before the gap may be returned."""
    top1 = torch.tensor([[0.3, 0.9, 1.0]]).repeat(200, 1)
    label = torch.tensor([[0, 1, 0]]).repeat(200, 1)
    trace = Trace((1, 2, 3), {"top1": top1}, label, 2)
    cal = offramp.calibrate(trace, "confidence")
    assert cal.policy.threshold == 0.91 and offramp.simulate(trace, cal).saved == 0.0
    assert offramp.simulate(trace, "confidence", threshold=0.2).agreement == 1.0


def test_losses_of_0_and_1_take_the_exact_binomial():
    cal = offramp.calibrate(one_exit([0.9] * 200, [1] * 3 + [0] * 197), "fixed")
    assert cal.certificate.p_value == pytest.approx(binom.cdf(3, 200, 0.05)) == pytest.approx(0.00905, abs=1e-4)


def test_losses_between_0_and_1_take_hoeffding_bentkus():
    cal = offramp.calibrate(toy_trace(), "confidence", risk="excess_loss", alpha=0.1)
    assert cal.certificate.test == "hoeffding_bentkus"


def test_too_few_rows_give_never_and_say_how_many_are_needed():
    cal = offramp.calibrate(one_exit([0.9] * 58, [0] * 58), "confidence")
    assert cal.policy == offramp.policy("never") and cal.certificate is None
    assert "At least 59 rows are needed" in cal.note
    assert offramp.calibrate(one_exit([0.9] * 59, [0] * 59), "confidence").certificate is not None


def test_a_risk_above_alpha_says_that_rows_do_not_help():
    cal = offramp.calibrate(one_exit([0.9] * 100, [1] * 100), "fixed")
    assert cal.certificate is None and "more rows would not help" in cal.note


def test_a_risk_just_below_alpha_says_how_many_rows_would_do():
    trace = one_exit([0.9] * 100, [1] * 4 + [0] * 96)
    cal = offramp.calibrate(trace, "fixed")
    assert cal.certificate is None
    rows = int(cal.note.split("About ")[1].split(" rows")[0])
    fewer = int(rows / 1.11)
    assert binom.cdf(math.ceil(0.04 * rows), rows, 0.05) <= 0.05 < binom.cdf(math.ceil(0.04 * fewer), fewer, 0.05)


def test_no_labelled_row_is_an_error():
    with pytest.raises(offramp.OfframpError, match="no row of the trace has a label"):
        offramp.calibrate(
            one_exit([0.9] * 9, [0] * 9, targets=torch.full((9,), -100)), "confidence", risk="accuracy_drop"
        )


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("patience", (2, 1)),
        ("fixed", (6, 4, 2)),
        ("margin", UNIT_GRID),
        ("decaying", UNIT_GRID),
        ("at_least", UNIT_GRID),
    ],
)
def test_the_order_says_what_was_tried(policy, order):
    cal = offramp.calibrate(toy_trace(), policy, alpha=0.3, delta=0.1)
    assert cal.certificate.order == order
    json.dumps(cal.certificate.order)


# A population whose risk is known exactly: confidence uniform on [0, 1]; a row disagrees with chance (1 - top1) / 2. At
# threshold t the rows that leave are top1 >= t, so risk(t) = integral of (1 - u) / 2 over [t, 1] = (1 - t)^2 / 4.
ALPHA, DELTA, TRIALS, ROWS = 0.05, 0.1, 600, 250


def true_risk(policy):
    return 0.0 if policy.name == "never" else (1 - policy.threshold) ** 2 / 4


@pytest.fixture(scope="module")
def calibrations():
    """600 calibrations, each on 250 fresh rows."""
    random, out = np.random.default_rng(0), []
    for _ in range(TRIALS):
        top1 = random.uniform(size=ROWS)
        trace = one_exit(top1, random.uniform(size=ROWS) < (1 - top1) / 2)
        out.append(offramp.calibrate(trace, "confidence", alpha=ALPHA, delta=DELTA))
    return out


def test_the_promise_is_broken_in_at_most_delta_of_the_calibrations(calibrations):
    broken = sum(true_risk(c.policy) > ALPHA for c in calibrations) / TRIALS
    assert broken <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / TRIALS)
    assert broken > 0.01  # some are: the population is no pushover, so the bound above says something


def test_the_promise_is_not_bought_by_doing_nothing(calibrations):
    """The boldest threshold allowed is 1 - 2 sqrt(.05) = .553; typical calibrations come near it."""
    assert all(c.certificate is not None for c in calibrations)
    assert 0.55 < np.median([c.policy.threshold for c in calibrations]) < 0.70


def test_the_test_above_can_fail():
    """Choosing the boldest threshold whose observed risk is below alpha, without a test, breaks it in most draws."""
    random, broken = np.random.default_rng(1), 0
    for _ in range(TRIALS):
        top1 = random.uniform(size=ROWS)
        wrong = random.uniform(size=ROWS) < (1 - top1) / 2
        boldest = min(t for t in UNIT_GRID if (wrong & (top1 >= t)).mean() <= ALPHA)
        broken += true_risk(offramp.policy("confidence", threshold=boldest)) > ALPHA
    assert broken / TRIALS > DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / TRIALS)


CONFIDENT = {"policy": "confidence", "threshold": 0.5}


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "saturation", "at_least", "budgeted"])
@pytest.mark.parametrize("risk", ["disagreement", "accuracy_drop", "excess_loss"])
def test_one_pass_per_exit_is_the_replay_of_every_rung(policy, risk):
    """Also with rows that have no label, and scores that are exactly on a rung."""
    trace = toy_trace(500)
    trace.targets[::7] = -100
    trace.stats["top1"][:50] = trace.stats["top1"][:50].double().mul(100).round().div(100).float()
    trace.stats["margin"][:50] = trace.stats["margin"][:50].double().mul(100).round().div(100).float()
    shut = {"at_least": {"depth": trace.depths[1]}, "budgeted": {"closed": [trace.depths[1]]}}
    if policy in shut:
        made = offramp.policy(policy, inner=CONFIDENT, **shut[policy])
    else:
        made = lookup(ExitPolicy, policy).example(trace.depths[:-1], 5)
    closed = [k for k, depth in enumerate(trace.depths[:-1]) if not made.opens(depth)]
    assert len(closed) == (policy in shut)
    found = list(_all_at_once(trace, made.inside(), risk, closed))
    wanted = [losses(trace, exit_columns(trace, rung), risk) for rung in made.ladder(trace.depths[:-1], 5)]
    assert [n for _, n in found] == [len(w) for w in wanted]
    assert [m for m, _ in found] == pytest.approx([w.mean() for w in wanted], abs=1e-12)
    assert len({m for m, _ in found}) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "risk", "alpha"),
    [("confidence", "disagreement", 0.03), ("entropy", "accuracy_drop", 0.015), ("margin", "excess_loss", 0.05)],
)
def test_the_promise_on_real_rows(digits, draws, policy, risk, alpha):
    """1,000 draws of 600 rows of digits; the risk of what was found is known: it is that on all of them."""
    broken, saved = 0, []
    for trace in draws(1000, 600):
        cal = offramp.calibrate(trace, policy, risk=risk, alpha=alpha, delta=DELTA)
        broken += losses(digits, exit_columns(digits, cal.policy), risk).mean() > alpha
        saved.append(offramp.simulate(digits, cal).saved)
    assert broken / 1000 <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 1000)
    assert np.mean(saved) > 0.4
