"""A classifier's page: its sections, and numbers that are the run's own."""

import copy

import pytest
import torch

from offramp import Trace, calibrate, simulate
from offramp.cli import as_dict
from offramp.report import classify, html, sections
from offramp.report.curves import summary
from offramp.report.scores import confusion, exit_scores


@pytest.fixture
def run():
    n, depths = 400, (1, 2, 3)
    sure = torch.rand(n, 3).sort(1).values
    targets = torch.arange(n) % 2
    label = torch.where(torch.rand(n, 3) < sure, targets[:, None], 1 - targets[:, None])
    table = Trace(depths, {"top1": sure}, label, 3, targets=targets)
    made = calibrate(table, "confidence", risk="accuracy_drop", alpha=0.2)
    out = simulate(table, made)
    row = {"name": "confidence", **as_dict(made), "accuracy": out.accuracy, "agreement": 0.9, "saved": out.saved}
    none = {"name": "patience", "policy": {"policy": "never"}, "note": "no & more"}
    row |= {"bound": 1.9, "speedup": 1.62, "speedup_quartiles": [1.5, 1.6, 1.7], "rows_per_second": 710.2}
    return {
        "format": 1,
        "unit": "row",
        "tiles": [("measured", "1.62×", "throughput <of> all")],
        **as_dict(made),
        "trace": summary(table, made, None),
        "policies": [{**row, "realised": 0.87, "moved": 2, "exits": {"1": 900, "3": 700}}, none],
        "exits": {"calibrated": {"1": 30, "3": 70}},
        "exit_scores": exit_scores(table),
        "confusion": confusion(table),
        "calibrators": [{"name": "fixed_sequence", **as_dict(made), "saved": out.saved}],
        "clock": {"batch": 64, "calls": 7},
    }


def test_the_sections_of_a_classifier(run):
    found = dict((name, heading) for name, heading, _ in sections(run))
    assert list(found) == ["exits", "accuracy", "policies", "calibrators", "scores", "confusion", "certificate"]
    assert found["exits"] == "Where rows were decided" and "tokens" not in html(run)


def test_what_was_measured_and_why_not(run):
    page = html(run)
    assert "1.62×" in page and "1.50 to 1.70" in page and "0.87" in page and "batch 64, 7 batches" in page
    assert "no &amp; more" in page and "throughput &lt;of&gt; all" in page
    assert "Of 1,600 answers, 2 came from another exit live" in page
    full = run["trace"]["full_accuracy"]
    assert f"full model: {full:.1%}" in page and 'class="star"' in page


def test_accuracy_at_equal_cost_is_in_the_table(run):
    part = classify.accuracy(run)
    fixed = [row for row in part.split("<tr>") if 'scope="row">fixed<' in row][0]
    right = next(p["accuracy"] for p in run["trace"]["curves"]["fixed"] if p["setting"]["depth"] == 1)
    assert f"<td>{right:.1%}</td>" in fixed  # a third of the cost is one block of three


PARTS = ("trace", "policies", "exit_scores", "confusion", "clock", "certificate", "calibrators")


@pytest.mark.parametrize("key", PARTS)
def test_no_part_needs_another(run, key):
    less = copy.deepcopy(run)
    del less[key]
    assert html(less).endswith("</html>\n")


def test_a_cell_is_the_darker_the_more_two_exits_agree():
    strengths = [int(classify.tint(share).split("/ ")[1].split("%")[0]) for share in (0.2, 0.5, 0.8, 1.0)]
    assert strengths == sorted(strengths) and strengths[0] == strengths[1] == 0


def test_a_setting_is_told_in_short():
    config = {"policy": "at_least", "inner": {"policy": "confidence", "threshold": [0.9, 0.123456]}, "depth": 3}
    assert classify.setting(config) == "inner confidence(threshold [0.9, 0.123]), depth 3"
