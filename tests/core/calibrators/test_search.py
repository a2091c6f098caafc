"""The search: limits kept, better than one number for all exits, the same twice; and no optuna."""

import sys

import pytest
import torch

import offramp
from offramp import Trace
from offramp.errors import BadArgument, OfframpError
from offramp.testing.calibrators import toy_trace


def search(trace, policy="confidence", **given):
    return offramp.calibrate(trace, policy, method="search", **given)


@pytest.mark.parametrize("policy", ["confidence", "entropy"])
def test_the_average_is_met_here_and_on_other_rows(policy):
    cal = search(toy_trace(20_000), policy, average=3.0)
    on = [offramp.simulate(toy_trace(20_000, seed=s), cal).cost_mean for s in (0, 1)]
    assert 2.99 <= on[0] <= 3.0 and on[1] == pytest.approx(3.0, rel=0.01)
    assert cal.certificate is None and "uncertified" in cal.note


def test_no_row_passes_the_peak():
    cal = search(toy_trace(2000), peak=6.5)
    assert cal.policy.last == 6
    out = offramp.simulate(toy_trace(2000, seed=1), cal)
    assert out.depths.max() == 6 and out.agreement > 0.95


def test_both_limits():
    cal = search(toy_trace(4000), peak=6, average=3.0)
    out = offramp.simulate(toy_trace(4000), cal)
    assert out.depths.max() == 6 and 2.95 <= out.cost_mean <= 3.0


def test_memory_bounds_the_depth():
    cal = search(toy_trace(500), memory=250, sizes=[100, 200, 300, 400])
    assert cal.policy.last == 4
    whole = search(toy_trace(500), memory=400, sizes=[100, 200, 300, 400])
    assert getattr(whole.policy, "last", None) is None


def test_the_first_exit_alone():
    cal = search(toy_trace(100), peak=2)
    assert offramp.simulate(toy_trace(100), cal).depths.tolist() == [2] * 100


def test_it_finds_what_one_parameter_cannot():
    """The second of three exits is always wrong. Shares that grow or fall with depth must use it; the search need not.
    """
    base = toy_trace(4000)
    label = base.label.clone()
    label[:, 1] = (label[:, 1] + 1) % 5
    trace = Trace(base.depths, base.stats, label, 5)
    one, other = (
        offramp.simulate(trace, offramp.calibrate(trace, "confidence", method=m, **{o: 5.0}))
        for m, o in (("budget", "budget"), ("search", "average"))
    )
    assert other.cost_mean <= 5.0 and other.agreement > one.agreement + 0.1


def test_it_is_no_worse_than_the_budget_it_starts_from():
    trace = toy_trace(4000)
    for budget in (2.5, 3.0, 4.0):
        one = offramp.simulate(trace, offramp.calibrate(trace, "margin", method="budget", budget=budget))
        other = offramp.simulate(trace, search(trace, "margin", average=budget))
        assert other.agreement >= one.agreement - 1e-3


def test_the_risk_is_what_is_minimised():
    trace = toy_trace(2000)
    targets = torch.where(torch.arange(2000) % 2 == 0, trace.targets, -100)
    half = Trace(trace.depths, trace.stats, trace.label, 5, targets=targets)
    assert "accuracy_drop" in search(half, risk="accuracy_drop").note


def test_a_seed_gives_the_same_twice_and_optuna_its_voice_back():
    import optuna

    before = optuna.logging.get_verbosity()
    assert search(toy_trace(), seed=3) == search(toy_trace(), seed=3)
    assert optuna.logging.get_verbosity() == before


def test_without_optuna_the_line_to_run_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(OfframpError, match=r"pip install 'offramp-core\[search\]'"):
        search(toy_trace())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peak": 1}, "no exit is within peak=1, memory=None; the first costs 2 blocks"),
        ({"memory": 5, "sizes": [10, 20, 30, 40]}, "takes 10"),
        ({"memory": 5}, "memory and sizes go together"),
        ({"sizes": [1, 2]}, "memory and sizes go together"),
        ({"memory": 5, "sizes": [1, 2]}, "2 sizes for 4 depths"),
        ({"average": 9}, "must lie between 2 blocks"),
        ({"trials": 0}, "trials=0 must be a whole number from 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(BadArgument, match=message):
        search(toy_trace(), **given)
