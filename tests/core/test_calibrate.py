"""The front door of calibration: what it accepts, what it passes on and what it refuses."""

import dataclasses

import pytest
import torch

import offramp
from offramp.errors import BadArgument, DamagedFile, UnknownName
from offramp.testing.calibrators import toy_trace


def test_a_name_an_object_and_a_config_give_the_same():
    trace = toy_trace()
    forms = [
        "confidence",
        offramp.policy("confidence", threshold=[0.1, 0.2, 0.3]),
        {"policy": "confidence", "threshold": 1},
    ]
    found = [offramp.calibrate(trace, form, alpha=0.1, delta=0.1) for form in forms]
    assert found[0] == found[1] == found[2] and found[0].certificate is not None


def test_options_go_to_the_policy_and_to_the_method():
    trace = toy_trace()
    found = offramp.calibrate(trace, "entropy", normalised=True, alpha=0.1)
    assert found.policy.normalised and 0 < found.policy.threshold <= 1
    late = offramp.calibrate(trace, "decaying", inner="margin", length=20, tau=1.0, alpha=0.1)
    assert (late.policy.length, late.policy.tau, late.policy.inner.name) == (20, 1.0, "margin")
    warm = offramp.calibrate(trace, "confidence", method="temperature", to="targets", threshold=0.7)
    assert warm.policy.inner.threshold == 0.7


def test_the_outcome_keeps_the_promise_on_its_own_trace():
    trace = toy_trace()
    cal = offramp.calibrate(trace, "margin", alpha=0.1, delta=0.1)
    assert 1 - offramp.simulate(trace, cal).agreement <= 0.1
    assert offramp.simulate(trace, cal).saved > 0.3


def test_save_and_load(tmp_path):
    cal = offramp.calibrate(toy_trace(), "decaying", alpha=0.1)
    cal.save(tmp_path / "c.json")
    assert offramp.Calibration.load(tmp_path / "c.json") == cal
    (tmp_path / "c.json").write_text((tmp_path / "c.json").read_text().replace('"alpha"', '"alhpa"'))
    with pytest.raises(DamagedFile, match="certificate is not complete"):
        offramp.Calibration.load(tmp_path / "c.json")


@pytest.mark.parametrize("name", ["alpha", "delta"])
@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), "0.05", True, None])
def test_alpha_and_delta_lie_between_0_and_1(name, value):
    with pytest.raises(BadArgument, match=f"{name} must be a number between 0 and 1"):
        offramp.calibrate(toy_trace(rows=20), "confidence", **{name: value})


@pytest.mark.parametrize(
    ("policy", "options", "kind", "message"),
    [
        ("confidense", {}, UnknownName, "did you mean 'confidence'"),
        ("confidence", {"method": "fixed_sequense"}, UnknownName, "did you mean 'fixed_sequence'"),
        ("confidence", {"risk": "disagreements"}, UnknownName, "did you mean 'disagreement'"),
        ("entropy", {"normalized": True}, UnknownName, "did you mean 'normalised'"),
        (offramp.policy("never"), {"normalised": True}, UnknownName, "has no option 'normalised'"),
        ("never", {}, BadArgument, "Never has no threshold to calibrate"),
        ("all_of", {}, BadArgument, "no single order"),
        ("any_of", {}, BadArgument, "no single order"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(policy, options, kind, message):
    with pytest.raises(kind, match=message):
        offramp.calibrate(toy_trace(rows=20), policy, **options)


def test_an_empty_trace_is_refused():
    with pytest.raises(BadArgument, match="no rows to calibrate on"):
        offramp.calibrate(toy_trace()[[]], "confidence")


def changed(rows=200, **more):
    """A toy trace with some of its arrays replaced."""
    trace = toy_trace(rows)
    return dataclasses.replace(trace, **{k: v(trace) for k, v in more.items()})


def with_nan(name, column):
    def stats(trace):
        table = trace.stats[name].clone()
        table[[5, 17], column] = float("nan")
        return {**trace.stats, name: table}

    return changed(stats=stats)


@pytest.mark.parametrize("method", ["fixed_sequence", "budget", "accuracy_gap", "window_fit", "beta_mixture"])
@pytest.mark.parametrize(("name", "column"), [("top1", 1), ("top1", 3), ("margin", 0)])
def test_rows_of_nan_are_refused_and_can_be_left_out(name, column, method):
    trace = with_nan(name, column)
    said = r"2 of 200 rows .* \(the first is row 5\).*trace = trace\[trace.finite\(\)\]"
    with pytest.raises(BadArgument, match=said):
        offramp.calibrate(trace, "confidence", method=method, alpha=0.1)
    left = trace[trace.finite()]
    assert len(left) == 198 and offramp.calibrate(left, "confidence", method=method, alpha=0.1).policy is not None


def test_nan_where_nobody_looks_is_no_error():
    """Cosines of the first column are undefined in every trace; others matter to a policy that reads them."""
    assert toy_trace().stats["cosine"][:, 0].isnan().all()
    offramp.calibrate(toy_trace(), "saturation", alpha=0.3)
    trace = with_nan("cosine", 2)
    offramp.calibrate(trace, "confidence", alpha=0.1)
    with pytest.raises(BadArgument, match="2 of 200 rows"):
        offramp.calibrate(trace, "saturation", alpha=0.1)


def test_rows_of_one_class_are_refused():
    one = changed(targets=lambda t: torch.full((200,), 3))
    with pytest.raises(BadArgument, match="all 200 labelled rows .* are of class 3, one of 5.*Shuffle"):
        offramp.calibrate(one, "confidence")
    some = changed(targets=lambda t: torch.where(torch.arange(200) < 150, 3, -100))
    with pytest.raises(BadArgument, match="all 150 labelled rows"):
        offramp.calibrate(some, "confidence")
    stats = {"top1": torch.ones(9, 2)}
    with pytest.raises(BadArgument, match="1 class, so no exit ever differs.*risk='excess_loss'"):
        offramp.calibrate(offramp.Trace((1, 2), stats, torch.zeros(9, 2).long(), 1), "confidence")


def test_a_statistic_that_the_trace_lacks_is_named_by_every_method():
    bare = changed(stats=lambda t: {"margin": t.stats["margin"]})
    for method in set(offramp.names(offramp.Calibrator)) - {"temperature", "conformal_sets"}:
        with pytest.raises(BadArgument, match="does not hold top1 .*record it again"):
            offramp.calibrate(bare, "confidence", method=method)


@pytest.mark.parametrize("method", offramp.names(offramp.Calibrator))
def test_every_method_says_whether_it_promises(method):
    cal = offramp.calibrate(toy_trace(1000), {"policy": "confidence", "threshold": 0.8}, method=method, alpha=0.1)
    assert cal.certificate is not None or cal.note.startswith("uncertified")
    assert cal.model_hash == "toy" and (cal.certificate is not None) is (
        method in ("fixed_sequence", "accuracy_gap", "conformal_sets")
    )


def test_each_method_has_a_risk_of_its_own():
    trace = toy_trace()
    found = {m: offramp.calibrate(trace, "confidence", method=m, alpha=0.1) for m in ("fixed_sequence", "accuracy_gap")}
    assert {m: c.certificate.risk for m, c in found.items()} == {
        "fixed_sequence": "disagreement",
        "accuracy_gap": "accuracy_drop",
    }
