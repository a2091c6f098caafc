"""The front door of calibration: what it accepts, what it passes on and what it refuses."""

import pytest

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
