"""Valid p-values for "the risk is above alpha", from independent losses in [0, 1]."""

from __future__ import annotations

import math


def binomial_p(failures: int, n: int, alpha: float) -> float:
    """Return P(Binomial(n, alpha) <= failures): the exact p-value of H: E[loss] > alpha for losses that are 0 or 1.

    Paper: Learn then Test (Angelopoulos et al., arXiv 2110.01052).
    """
    from scipy.stats import binom

    return float(binom.cdf(failures, n, alpha))


def hoeffding_bentkus_p(mean: float, n: int, alpha: float) -> float:
    """Return the Hoeffding-Bentkus p-value of H: E[loss] > alpha for the mean of n losses in [0, 1].

    min{exp(-n h(mean, alpha)), e P(Binomial(n, alpha) <= ceil(n mean))} with h the binary relative entropy. Valid for
    any losses in [0, 1]; for 0/1 losses `binomial_p` is smaller. Paper: Bates et al., JACM 2021 (arXiv 2101.02703).
    """
    from scipy.stats import binom

    if mean >= alpha:
        return 1.0
    hoeffding = math.exp(-n * _relative_entropy(mean, alpha))
    # n * mean of losses that add up to a whole number can come out as 7.000000000000001; ceil would make it 8
    bentkus = math.e * float(binom.cdf(math.ceil(n * mean - 1e-9), n, alpha))
    return min(1.0, hoeffding, bentkus)


def rows_needed(alpha: float, delta: float) -> int:
    """Return the least number of rows with which no loss at all certifies risk <= alpha at confidence 1 - delta."""
    return math.ceil(math.log(delta) / math.log1p(-alpha) - 1e-9)


def expected_rank(n: int, alpha: float) -> int:
    """Return which of n scores, from the smallest on, gives coverage 1 - alpha on average; above n where none does."""
    return math.ceil((n + 1) * (1 - alpha) - 1e-9)


def certain_rank(n: int, alpha: float, delta: float) -> int:
    """Return which of n scores gives coverage 1 - alpha with confidence 1 - delta; n + 1 where none does.

    The least r with P(Binomial(n, alpha) <= n - r) <= delta: with a smaller one, so few misses among n rows would be
    too likely at coverage 1 - alpha. Paper: Vovk, Conditional Validity of Inductive Conformal Predictors (2012).
    """
    from scipy.stats import binom

    misses = int(binom.ppf(delta, n, alpha))  # the least with P(. <= misses) >= delta
    while misses >= 0 and binom.cdf(misses, n, alpha) > delta:
        misses -= 1
    return n - misses


def _relative_entropy(a: float, b: float) -> float:
    low = a * math.log(a / b) if a > 0 else 0.0  # 0 ln 0 = 0
    high = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return low + high
