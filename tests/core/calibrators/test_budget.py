"""The budget: golden vectors of the solver, exactness on the trace, and the same mean cost on rows never seen."""

import math

import numpy as np
import pytest
import torch

import offramp
from offramp import Trace
from offramp.calibrators._quota import bisect, fill, geometric
from offramp.calibrators.budget import Budget
from offramp.errors import BadArgument
from offramp.testing.calibrators import toy_trace

FIRST = [0.95, 0.9, 0.6, 0.55, 0.3, 0.2, 0.8, 0.7]
SECOND = [0.99, 0.97, 0.9, 0.5, 0.6, 0.4, 0.85, 0.95]


@pytest.mark.parametrize(
    ("q", "shares", "cuts", "exits"),
    [
        (0.5, [0.5714, 0.2857, 0.1429], [0.7, 0.6], [0, 0, 1, 2, 1, 2, 0, 0]),
        (1.0, [1 / 3, 1 / 3, 1 / 3], [0.9, 0.9], [0, 0, 1, 2, 2, 2, 2, 1]),
        (2.0, [0.1429, 0.2857, 0.5714], [0.95, 0.95], [0, 1, 2, 2, 2, 2, 2, 1]),
    ],
)
def test_golden_vectors(q, shares, cuts, exits):
    share = geometric(q, 3)
    assert share == pytest.approx(shares, abs=5e-5)
    found, columns = fill(np.array([FIRST, SECOND], np.float32), share)
    assert found == pytest.approx(cuts) and columns.tolist() == exits


@pytest.mark.parametrize(
    ("j", "shares"),
    [
        (1, [0.95, 0.0475, 0.0024, 0.0001, 0]),
        (10, [0.5161, 0.2581, 0.129, 0.0645, 0.0323]),
        (20, [0.2] * 5),
        (39, [0.0349, 0.0681, 0.1328, 0.259, 0.5051]),
    ],
)
def test_golden_mixes(j, shares):
    assert geometric(j / 20, 5) == pytest.approx(shares, abs=5e-5)


def by_hand(sure, shares):
    """The solver as a plain double loop over exits and rows."""
    k, n = sure.shape
    left, out, over = [None] * n, [], 0
    for e in range(k):
        alive = sorted((i for i in range(n) if left[i] is None and sure[e, i] > -np.inf), key=lambda i: -sure[e, i])
        wanted = math.floor(n * shares[e] + 1e-9) + over
        quota = min(len(alive), wanted)
        over = wanted - quota
        cut = sure[e, alive[quota - 1]] if quota else None
        out.append(cut)
        for i in alive:
            if cut is not None and sure[e, i] >= cut:
                left[i] = e
    return out, [k if e is None else e for e in left]


@pytest.mark.parametrize("seed", range(20))
def test_the_solver_is_the_double_loop(seed):
    random = np.random.default_rng(seed)
    sure = random.integers(0, 12, (3, 40)).astype(np.float32)  # many ties
    sure[random.uniform(size=sure.shape) < 0.1] = -np.inf
    shares = random.dirichlet(np.ones(4))
    cuts, columns = fill(sure, shares)
    wanted, left = by_hand(sure, shares)
    assert list(cuts) == wanted and columns.tolist() == left


@pytest.mark.parametrize("name", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("budget", [2.2, 4.1, 7.5])
def test_the_budget_is_met_on_the_trace_and_on_other_rows(name, budget):
    cal = offramp.calibrate(toy_trace(20_000), name, method="budget", budget=budget)
    on = [offramp.simulate(toy_trace(20_000, seed=s), cal).cost_mean for s in (0, 1)]
    assert budget * (1 - 1e-3) <= on[0] <= budget
    assert on[1] == pytest.approx(budget, rel=0.01)
    assert cal.certificate is None and "uncertified" in cal.note and "blocks" in cal.note


@pytest.mark.parametrize("method", ["budget", "exponential_weights", "search"])
def test_an_exit_without_scores_takes_no_part(method):
    """Cosines start at the second exit, so what is cheapest there is 4 blocks; 4.8 is met, and 3.9 refused."""
    given = {"method": method, {"search": "average"}.get(method, "budget"): 4.8}
    cal = offramp.calibrate(toy_trace(20_000), "saturation", **given)
    assert offramp.simulate(toy_trace(20_000, seed=1), cal).cost_mean == pytest.approx(4.8, rel=0.01)
    with pytest.raises(BadArgument, match="between 4 blocks .all rows leave at depth 4"):
        offramp.calibrate(toy_trace(), "saturation", **{k: 3.9 if v == 4.8 else v for k, v in given.items()})


def test_a_score_that_few_rows_have_does_not_break_the_budget():
    """At the first exit 5 % of the rows have a score at all, and the share that it cannot take goes to the next."""
    trace = toy_trace(4000)
    trace.stats["cosine"][:, 1] = torch.where(torch.rand(4000) < 0.05, trace.stats["cosine"][:, 1], -torch.inf)
    policy = offramp.policy("saturation", threshold=0.9)
    cal = Budget(budget=5.95).fit(trace, policy, alpha=0.1, delta=0.1, risk="disagreement")
    assert offramp.simulate(trace, cal).cost_mean == pytest.approx(5.95, rel=1e-3)


def test_on_real_rows_too(digits):
    """Even rows calibrate, odd ones are held out. Two means of about 600 rows differ by chance: 3 standard errors."""
    even, odd = digits[::2], digits[1::2]
    cal = offramp.calibrate(even, "confidence", method="budget", budget=2.0)
    out = offramp.simulate(odd, cal)
    error = float(digits.costs[out.columns].std()) * (2 / len(odd)) ** 0.5
    assert abs(out.cost_mean - 2.0) < max(0.02, 3 * error)


def test_costs_have_the_unit_of_the_trace():
    trace = toy_trace(2000)
    priced = Trace(trace.depths, trace.stats, trace.label, 5, costs=torch.tensor([1.0, 10, 20, 100]), unit="flops")
    cal = offramp.calibrate(priced, "confidence", method="budget", budget=12.0)
    assert offramp.simulate(priced, cal).cost_mean == pytest.approx(12, rel=0.01) and "12 flops" in cal.note


def test_a_tighter_budget_costs_agreement():
    trace = toy_trace(2000)
    cals = [offramp.calibrate(trace, "margin", method="budget", budget=b) for b in (2.5, 4, 6)]
    found = [offramp.simulate(trace, cal) for cal in cals]
    assert found[0].agreement < found[1].agreement <= found[2].agreement


def test_rows_that_are_all_alike_leave_together_below_the_budget():
    """One score for all: any threshold moves every row, so the mean cost is 2 or 6; 4 is not to be had."""
    trace = Trace((2, 6), {"top1": torch.full((50, 2), 0.5)}, torch.zeros(50, 2, dtype=torch.long), 2)
    cal = offramp.calibrate(trace, "confidence", method="budget", budget=4.0)
    assert offramp.simulate(trace, cal).cost_mean == 2.0 and "mean cost 2 blocks" in cal.note


def test_an_exit_whose_share_is_less_than_a_row_is_closed():
    sure = np.tile(np.linspace(0, 1, 20, dtype=np.float32), (2, 1))
    cuts, columns = bisect(sure, np.array([1.0, 2.0, 3.0]), 2.97, lambda t: geometric(math.exp(t), 3))
    assert cuts[0] is None and (columns == 2).sum() >= 19
    cal = offramp.calibrate(toy_trace(30), "confidence", method="budget", budget=7.9)
    assert offramp.simulate(toy_trace(30), cal).cost_mean <= 7.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 2.0}, r"between 2 blocks \(all rows leave at depth 2\) and 8 blocks.*e.g. budget=5"),
        ({"budget": 8}, "both excluded"),
        ({"budget": "4"}, "budget='4'"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"budget": True}, "budget=True"),
    ],
)
def test_a_budget_that_no_threshold_meets_is_refused(given, message):
    with pytest.raises(BadArgument, match=message):
        offramp.calibrate(toy_trace(), "confidence", method="budget", **given)


def test_policies_without_a_score_are_refused():
    with pytest.raises(BadArgument, match="Patience has none that it could set; use e.g. \"confidence\""):
        offramp.calibrate(toy_trace(), "patience", method="budget")
