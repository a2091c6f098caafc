"""Curves of policies on one trace, and what they reach at an equal cost."""

import pytest
import torch

from offramp import ExitPolicy, Trace, names, simulate
from offramp.report.curves import at_cost, curve, curves, summary


def trace(n=300, depths=(1, 2, 4)):
    sure = torch.rand(n, len(depths)).sort(1).values
    right = torch.rand(n, len(depths)) < sure
    right[:, -1] = True
    stats = {"top1": sure, "margin": sure**2, "entropy": -sure.log(), "cosine": sure}
    return Trace(depths, stats, torch.where(right, 1, 0), classes=5, targets=torch.ones(n, dtype=torch.long))


def test_a_coin_between_two_settings_earns_in_between():
    points = [{"cost_mean": 1.0, "accuracy": 0.5}, {"cost_mean": 3.0, "accuracy": 0.9}]
    assert at_cost(points, 2.0) == pytest.approx(0.7)
    assert at_cost(points, 3.0) == at_cost(points, 9.0) == 0.9 and at_cost(points, 0.5) is None


def test_a_point_below_the_line_between_two_others_is_passed_over():
    points = [{"cost_mean": c, "accuracy": a} for c, a in ((1.0, 0.5), (2.0, 0.5), (3.0, 0.9))]
    assert at_cost(points, 2.0) == pytest.approx(0.7)


def test_all_policies_that_fit_have_a_curve_and_its_points_are_what_simulate_says():
    table = trace()
    found = curves(table)
    fit = {"confidence", "margin", "entropy", "fixed", "patience", "saturation"}
    assert fit <= set(found) <= set(names(ExitPolicy))
    for point in curve(table, "fixed"):
        out = simulate(table, "fixed", depth=point["setting"]["depth"])
        assert point["accuracy"] == pytest.approx(out.accuracy, abs=1e-6)
        assert point["cost_mean"] == pytest.approx(out.cost_mean, abs=1e-6)


def test_the_summary_of_a_labelled_trace_names_the_full_model():
    body = summary(trace(), None, None)
    assert body["full_accuracy"] == 1.0 and body["full_cost"] == 4.0 and body["unit"] == "blocks"
    assert "full_accuracy" not in summary(Trace((1, 2), trace(depths=(1, 2)).stats, trace(depths=(1, 2)).label, 5))
