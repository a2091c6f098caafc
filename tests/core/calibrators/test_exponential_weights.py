"""Exponential weights: golden vectors, the condition they solve, and the budget kept."""

import numpy as np
import pytest

import offramp
from offramp import Trace
from offramp.calibrators.exponential_weights import weights
from offramp.errors import BadArgument
from offramp.testing.calibrators import toy_trace

RISKS, COSTS = np.array([0.30, 0.22, 0.18, 0.17]), np.array([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("budget", "shares"),
    [
        (0.4, [0.5343, 0.3477, 0.1017, 0.0163]),
        (0.6, [0.1909, 0.3606, 0.3060, 0.1425]),
        (0.8, [0.0343, 0.1667, 0.3636, 0.4354]),
    ],
)
def test_golden_vectors(budget, shares):
    found = weights(RISKS, COSTS, budget, 20.0)
    assert found == pytest.approx(shares, abs=5e-5) and found @ COSTS == pytest.approx(budget, abs=1e-9)


def test_no_other_shares_of_that_cost_are_better():
    """They are the least of mean risk + KL / beta among all shares of this mean cost: tried 2,000 directions around."""

    def value(p):
        return p @ RISKS + p @ np.log(4 * p) / 20

    best, random = weights(RISKS, COSTS, 0.6, 20.0), np.random.default_rng(0)
    span = np.linalg.svd(np.stack([np.ones(4), COSTS]))[2][2:]  # keeps the sum and the cost
    for _ in range(2000):
        other = best + 0.02 * random.normal(size=2) @ span
        assert other @ COSTS == pytest.approx(0.6) and value(other) > value(best)


def test_the_budget_binds_only_from_above():
    free = weights(RISKS, COSTS, 0.99, 20.0)
    assert free @ COSTS < 0.99 and free == pytest.approx(np.exp(-20 * RISKS) / np.exp(-20 * RISKS).sum())


def test_the_unit_of_the_costs_does_not_matter():
    assert weights(RISKS, COSTS * 1e12, 0.6e12, 20.0) == pytest.approx(weights(RISKS, COSTS, 0.6, 20.0))


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_budget_is_met_on_other_rows(rounds):
    given = {"method": "exponential_weights", "budget": 3.5, "rounds": rounds}
    cal = offramp.calibrate(toy_trace(20_000), "confidence", **given)
    assert offramp.simulate(toy_trace(20_000, seed=1), cal).cost_mean == pytest.approx(3.5, rel=0.01)
    assert cal.certificate is None and "shares" in cal.note


def test_an_exit_that_errs_gets_less():
    trace = toy_trace(2000)
    label = trace.label.clone()
    label[::2, 1] = (label[::2, 1] + 1) % 5
    worse = Trace(trace.depths, trace.stats, label, 5, targets=trace.targets)
    given = {"method": "exponential_weights", "budget": 4.0}
    good, bad = (offramp.simulate(trace, offramp.calibrate(t, "margin", **given)) for t in (trace, worse))
    assert (bad.columns == 1).sum() < 0.1 * (good.columns == 1).sum()


def test_without_labels_the_full_model_is_right():
    trace = toy_trace(2000)
    bare = Trace(trace.depths, trace.stats, trace.label, 5)
    own = Trace(trace.depths, trace.stats, trace.label, 5, targets=trace.label[:, -1])
    given = {"method": "exponential_weights", "budget": 4.0}
    one, other = (offramp.calibrate(t, "confidence", **given) for t in (bare, own))
    assert one.policy == other.policy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0}, "beta must be a number above 0"),
        ({"rounds": -1}, "rounds must be a whole number"),
        ({"budget": 1.0}, "must lie between 2 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(BadArgument, match=message):
        offramp.calibrate(toy_trace(), "confidence", method="exponential_weights", **given)
