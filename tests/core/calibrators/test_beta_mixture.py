"""Two Beta distributions: recovered from draws, and the score from which on one outweighs the other."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import beta

import offramp
from offramp import Trace
from offramp.calibrators.beta_mixture import log_density
from offramp.errors import BadArgument
from offramp.testing.calibrators import toy_trace

RIGHT, WRONG = (8.0, 2.0), (2.0, 4.0)


def drawn(n=200_000, share=0.5, seed=0):
    """One exit whose scores follow RIGHT where it agrees and WRONG where it does not."""
    random = np.random.default_rng(seed)
    right = random.uniform(size=n) < share
    score = np.where(right, random.beta(*RIGHT, n), random.beta(*WRONG, n))
    top1 = torch.tensor(np.stack([score, np.ones(n)], 1), dtype=torch.float32)
    label = torch.tensor(np.stack([~right, np.zeros(n)], 1)).long()
    return Trace((1, 2), {"top1": top1, "margin": top1}, label, 2)


def crossing(zeta, share=0.5):
    """Where the share of the right density is zeta, from the true parameters."""

    def over(s):
        odds = beta.logpdf(s, *RIGHT) - beta.logpdf(s, *WRONG) + np.log(share / (1 - share))
        return odds - np.log(zeta / (1 - zeta))

    return brentq(over, 0.01, 0.99)


def test_moments_recover_the_distribution():
    at = np.linspace(0.1, 0.9, 9)
    found = log_density(np.random.default_rng(0).beta(*RIGHT, 200_000), at)
    assert found == pytest.approx(beta.logpdf(at, *RIGHT), abs=0.1)


@pytest.mark.parametrize("name", ["confidence", "margin"])
@pytest.mark.parametrize("zeta", [0.1, 0.4, 0.9])
def test_the_threshold_is_where_the_densities_cross(name, zeta):
    cal = offramp.calibrate(drawn(), name, method="beta_mixture", zeta=zeta)
    assert crossing(zeta) <= cal.policy.threshold[0] + 0.005 and cal.policy.threshold[0] < crossing(zeta) + 0.02


def test_shares_make_zeta_a_probability():
    """Nine in ten agree: a row at the threshold agrees with probability .9, and the threshold is bolder for it."""
    trace = drawn(share=0.9)
    found = [
        offramp.calibrate(trace, "confidence", method="beta_mixture", zeta=0.9, shares=s).policy.threshold[0]
        for s in (False, True)
    ]
    assert found[1] < found[0] - 0.1 and found[1] == pytest.approx(crossing(0.9, 0.9), abs=0.02)
    near = (trace.stats["top1"][:, 0] - found[1]).abs() < 0.01
    assert float((trace.label[near, 0] == 0).double().mean()) == pytest.approx(0.9, abs=0.02)


def test_higher_zeta_is_safer():
    trace = toy_trace(4000)
    found = [
        offramp.simulate(trace, offramp.calibrate(trace, "entropy", method="beta_mixture", zeta=z)) for z in (0.2, 0.8)
    ]
    assert found[0].saved > found[1].saved > 0 and found[0].agreement < found[1].agreement


def test_an_exit_that_is_never_right_is_closed_and_one_that_is_never_wrong_open():
    label = torch.tensor([[1, 0, 0]]).repeat(50, 1)
    trace = Trace((1, 2, 3), {"top1": torch.rand(50, 3)}, label, 2)
    cal = offramp.calibrate(trace, "confidence", method="beta_mixture")
    assert cal.policy.closed == (1,) and (offramp.simulate(trace, cal).columns == 1).all()


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        ("confidence", {"zeta": 0}, "zeta must be a number between 0 and 1"),
        ("confidence", {"shares": 1}, "True or False"),
        ("patience", {}, "Patience has none"),
    ],
)
def test_what_does_not_fit_is_refused(policy, given, message):
    with pytest.raises(BadArgument, match=message):
        offramp.calibrate(toy_trace(), policy, method="beta_mixture", **given)
