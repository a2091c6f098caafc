"""p-values against golden vectors worked out independently, and what makes them p-values: super-uniformity."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binom

from offramp.pvalues import binomial_p, hoeffding_bentkus_p, rows_needed

# mean, n, alpha: Hoeffding-Bentkus, exact binomial
GOLDEN = [
    (0.07, 1000, 0.1, 0.00156164, 0.000574496),
    (0.0, 100, 0.1, 2.65614e-5, 2.65614e-5),
    (0.03, 500, 0.05, 0.0539807, 0.0198584),
    (0.04, 200, 0.1, 0.00377307, 0.00138803),
]


@pytest.mark.parametrize(("mean", "n", "alpha", "hb", "exact"), GOLDEN)
def test_golden_vectors(mean, n, alpha, hb, exact):
    assert hoeffding_bentkus_p(mean, n, alpha) == pytest.approx(hb, rel=1e-5)
    assert binomial_p(round(mean * n), n, alpha) == pytest.approx(exact, rel=1e-5)


def test_at_or_above_alpha_nothing_is_rejected():
    assert hoeffding_bentkus_p(0.1, 1000, 0.1) == 1.0
    assert hoeffding_bentkus_p(1.0, 10, 0.1) == 1.0
    assert binomial_p(10, 10, 0.1) == 1.0


def test_float_error_in_the_sum_does_not_cost_a_step():
    """7 losses of 0.1 ... in floats 0.07 * 100 is 7.000000000000001, whose ceiling is 8."""
    assert 0.07 * 100 > 7
    bentkus = math.e * binom.cdf(7, 100, 0.3)
    assert hoeffding_bentkus_p(0.07, 100, 0.3) <= bentkus < math.e * binom.cdf(8, 100, 0.3)


@pytest.mark.parametrize(("alpha", "delta", "rows"), [(0.05, 0.05, 59), (0.1, 0.1, 22), (0.5, 0.25, 2)])
def test_rows_needed(alpha, delta, rows):
    assert rows_needed(alpha, delta) == rows
    assert binomial_p(0, rows, alpha) <= delta * (1 + 1e-12) < binomial_p(0, rows - 1, alpha)


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
def test_binomial_is_super_uniform_at_the_edge_of_the_null(delta):
    """Exactly: the chance of p <= delta when the risk is alpha, summed over all counts, is at most delta."""
    n, alpha = 120, 0.1
    rejected = [k for k in range(n + 1) if binomial_p(k, n, alpha) <= delta]
    chance = binom.pmf(rejected, n, alpha).sum()
    assert 0 < chance <= delta


def test_hoeffding_bentkus_is_super_uniform_for_losses_between_0_and_1():
    """Losses 0, .25, .5, .75 with mean exactly .1, n = 200; the methods file found P(p <= .05) = .00055 that way."""
    draws, n = 4000, 200
    values, weights = np.array([0, 0.25, 0.5, 0.75]), np.array([0.775, 0.10, 0.075, 0.05])
    assert values @ weights == pytest.approx(0.1)
    means = np.random.default_rng(0).choice(values, (draws, n), p=weights).mean(1)
    found = {m: hoeffding_bentkus_p(float(m), n, 0.1) for m in np.unique(means)}
    p = np.array([found[m] for m in means])
    for delta in (0.05, 0.2):
        assert (p <= delta).mean() <= delta
    assert (p < 1).any()


def test_hoeffding_bentkus_grows_with_the_mean_and_falls_with_n():
    means = [hoeffding_bentkus_p(m / 100, 400, 0.1) for m in range(11)]
    assert means == sorted(means) and means[0] < 1e-15 and means[-1] == 1.0
    assert hoeffding_bentkus_p(0.05, 800, 0.1) < hoeffding_bentkus_p(0.05, 400, 0.1)


def test_importing_offramp_does_not_import_scipy():
    modules = "sys, offramp, offramp.calibrators.fixed_sequence, offramp.calibrators.temperature"
    code = f"import {modules}; print('scipy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# mean, n, alpha: Hoeffding's relative entropy, e times the binomial, plain Hoeffding
PARTS = [
    (0.07, 1000, 0.1, 0.00397675, 0.00156164),
    (0.0, 100, 0.1, 2.65614e-5, 7.22014e-5),
    (0.03, 500, 0.05, 0.0869738, 0.0539807),
    (0.04, 200, 0.1, 0.00633877, 0.00377307),
]


@pytest.mark.parametrize(("mean", "n", "alpha", "hoeffding", "bentkus"), PARTS)
def test_it_is_the_smaller_of_two(mean, n, alpha, hoeffding, bentkus):
    assert hoeffding_bentkus_p(mean, n, alpha) == pytest.approx(min(hoeffding, bentkus), rel=2e-6)
    assert math.e * binomial_p(round(mean * n), n, alpha) == pytest.approx(bentkus, rel=2e-6)
    assert binomial_p(0, 100, 0.1) == pytest.approx(2.65614e-5, rel=2e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [25, 200, 1000, 4096])
def test_they_are_mapies(n, alpha):
    """Losses of 0 and 1 and of eighths, so that n times the mean is exact in floats and both round it alike."""
    from mapie.risk_control import methods

    counts = np.unique(np.linspace(0, int(1.2 * alpha * n) + 1, 40).astype(int))
    means = np.concatenate([counts / n, (counts + 0.125) / n])
    exact = np.abs(np.round(means * n * 8) - means * n * 8) == 0
    means = means[exact & (means < alpha)]
    assert len(means) > 3 or n * alpha < 3
    ours = [hoeffding_bentkus_p(float(m), n, alpha) for m in means]
    theirs = methods.compute_hoeffding_bentkus_p_value(means, n, alpha)[:, 0]
    assert np.allclose(ours, np.minimum(theirs, 1), rtol=0, atol=1e-9)
    whole = means[means * n == np.round(means * n)]
    binary = methods.compute_hoeffding_bentkus_p_value(whole, n, alpha, binary=True)[:, 0]
    exactly = np.array([binomial_p(round(m * n), n, alpha) for m in whole])
    h1 = np.array([hoeffding_bentkus_p(float(m), n, alpha) for m in whole])
    assert np.allclose(np.minimum(exactly, h1), binary, rtol=0, atol=1e-9)
