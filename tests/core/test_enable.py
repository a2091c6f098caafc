"""One line on, one line off, and honest numbers in between."""

import inspect
import json

import pytest
import torch

import offramp
from offramp._registry import lookup
from offramp.calibration import Calibration
from offramp.enable import RUN, Run, Stats
from offramp.errors import BadArgument, NotAttached, OfframpError, UnknownName
from offramp.options import OPTIONS
from offramp.testing.toy import ToyBackbone


@pytest.fixture
def exits(model):
    return offramp.attach(model, [2, 4])


def test_enable_gives_a_run_and_disable_is_exact(model, exits, x, marks):
    before, keys, full = marks(model), list(model.state_dict()), model(x)
    run = offramp.enable(model, "fixed", depth=4)
    assert isinstance(run, Run) and run.enabled and "enabled" in repr(run)
    assert not torch.equal(model(x), full)
    run.disable()
    run.disable()
    assert not run.enabled and "disabled" in repr(run)
    assert marks(model) == before and list(model.state_dict()) == keys and torch.equal(model(x), full)


def test_with_disables_also_on_an_exception(model, exits, marks):
    before = marks(model)
    with pytest.raises(KeyboardInterrupt), offramp.enable(model, "never"):
        raise KeyboardInterrupt
    assert marks(model) == before


def test_an_old_run_does_not_disable_the_new_one(model, exits):
    old = offramp.enable(model, "never")
    old.disable()
    new = offramp.enable(model, "never")
    old.disable()
    assert new.enabled and not old.enabled


def test_enable_twice(model, exits, x):
    run = offramp.enable(model, "fixed", depth=2)
    with pytest.raises(NotAttached, match=r"already enabled on this model; first: run.disable\(\)"):
        offramp.enable(model, "never")
    model(x)
    assert run.enabled and run.stats.exits == {2: 7}


def test_a_policy_as_name_object_calibration_or_config(model, exits, x):
    policy = offramp.policy("fixed", depth=4)
    ways = [("fixed", {"depth": 4}), (policy, {}), (Calibration(policy), {}), ({"policy": "fixed", "depth": 4}, {})]
    for given, options in ways:
        with offramp.enable(model, given, **options) as run:
            model(x)
        assert run.policy == policy and run.stats.exits == {4: 7}


@pytest.mark.parametrize(
    ("policy", "options", "error", "message"),
    [
        ("confidense", {"threshold": 0.9}, UnknownName, "did you mean 'confidence'"),
        ("confidence", {"treshold": 0.9}, UnknownName, "no option 'treshold'; did you mean 'threshold'"),
        ("confidence", {}, UnknownName, "threshold"),
        ("confidence", {"threshold": 1.5}, BadArgument, r"threshold 1.5 is outside \[0, 1\].*\"never\""),
        ("confidence", {"threshold": [0.5]}, BadArgument, r"1 thresholds for 2 exits \(at \[2, 4\]\)"),
        ("fixed", {"depth": 5}, BadArgument, "deeper than every exit"),
        (offramp.policy("never"), {"threshold": 1}, BadArgument, r"options \['threshold'\] go with a policy's name"),
        (Calibration(offramp.policy("confidence", threshold=[0.5] * 3)), {}, BadArgument, "3 thresholds for 2 exits"),
        (3, {}, BadArgument, "must be a name, a policy or a calibration, not int"),
        ({"threshold": 0.5}, {}, BadArgument, 'under "policy"'),
        ("never", {"kv": "hole"}, BadArgument, "kv='hole' is not known; choose one of catch_up, propagate, recompute"),
        ("never", {"draft": 0}, BadArgument, "draft=0 must be a positive number"),
        ("never", {"verify": True}, BadArgument, "verify and draft need a model that generates"),
    ],
)
def test_what_fails_changes_nothing(model, exits, x, marks, policy, options, error, message):
    before, full = marks(model), model(x)
    with pytest.raises(error, match=message):
        offramp.enable(model, policy, **options)
    assert marks(model) == before and torch.equal(model(x), full)


def test_no_exits_attached(model, marks):
    before = marks(model)
    with pytest.raises(
        NotAttached, match=r"ToyModel has no exits attached; first: offramp.attach\(model, at=\[...\]\)"
    ):
        offramp.enable(model, "never")
    assert marks(model) == before


def test_a_backbone_that_fails_to_drive(model, exits, marks, monkeypatch):
    def fail(self, run):
        raise KeyboardInterrupt

    before = marks(model)
    monkeypatch.setattr(ToyBackbone, "drive", fail)
    with pytest.raises(KeyboardInterrupt):
        offramp.enable(model, "never")
    assert marks(model) == before and RUN not in model.__dict__


def test_the_flag_of_the_config(model, exits, x):
    model.config.early_exit = {"policy": "fixed", "depth": 4, "strict": True}
    with offramp.enable(model) as run:
        model(x)
    assert run.stats.exits == {4: 7} and run.options.strict
    assert model.config.early_exit == {"policy": "fixed", "depth": 4, "strict": True}


def test_the_flag_loads_its_exits_and_disable_takes_them_off(model, exits, x, marks, tmp_path):
    exits.save(tmp_path / "exits")
    exits.detach()
    before, keys = marks(model), list(model.state_dict())
    model.config.early_exit = {"policy": "fixed", "depth": 4, "exits": str(tmp_path / "exits")}
    run = offramp.enable(model)
    model(x)
    assert run.stats.exits == {4: 7}
    run.disable()
    assert marks(model) == before and list(model.state_dict()) == keys
    model.config.early_exit["depth"] = 5
    with pytest.raises(BadArgument, match="deeper than every exit"):
        offramp.enable(model)
    assert marks(model) == before


def test_the_flag_uses_exits_that_are_there(model, exits, tmp_path):
    model.config.early_exit = {"policy": "never", "exits": str(tmp_path / "not looked at")}
    offramp.enable(model).disable()
    assert exits[2] is not None


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (None, r"config has no early_exit; write offramp.enable\(model, \"confidence\", threshold=0.9\)"),
        ("confidence", "early_exit must be a dict with a \"policy\".*got 'confidence'"),
        ({"threshold": 0.9}, "early_exit must be a dict"),
        ({"policy": "confidense"}, "did you mean 'confidence'"),
        ({"policy": {"policy": "never"}}, "named by a string"),
        ({"policy": "confidence", "treshold": 0.9}, "'confidence' has no option 'treshold'; did you mean 'threshold'"),
        ({"policy": "confidence", "threshold": 0.9, "verifi": 1}, "no option 'verifi'; did you mean 'verify'"),
        ({"policy": "confidence", "threshold": 7}, "outside"),
        ({"policy": "never", "kv": "hole"}, "choose one of catch_up, propagate, recompute"),
    ],
)
def test_a_wrong_flag_changes_nothing(model, exits, marks, flag, message):
    model.config.early_exit = flag
    before = marks(model)
    with pytest.raises(BadArgument, match=message):
        offramp.enable(model)
    assert marks(model) == before


def test_a_flag_and_options_together(model, exits):
    model.config.early_exit = {"policy": "never"}
    with pytest.raises(BadArgument, match=r"options \['threshold'\] need a policy"):
        offramp.enable(model, threshold=0.5)


def test_a_flag_without_exits(model, tmp_path):
    model.config.early_exit = {"policy": "never"}
    with pytest.raises(NotAttached, match="no exits attached"):
        offramp.enable(model)
    model.config.early_exit["exits"] = str(tmp_path / "none")
    with pytest.raises(OfframpError, match="neither a directory nor a hub id"):
        offramp.enable(model)


FIELDS = {
    "rows", "exits", "depth_mean", "blocks_run", "blocks_full", "saved", "last_depths", "tokens", "rounds", "drafted",
    "accepted",
}  # fmt: skip


def test_stats_have_the_fields_of_the_public_surface(model, exits, x):
    with offramp.enable(model, "fixed", depth=4) as run:
        model(x)
        model(x[:2])
    stats = run.stats
    assert all(hasattr(stats, name) for name in FIELDS)
    assert (stats.rows, stats.exits, stats.depth_mean) == (9, {4: 9}, 4.0)
    assert (stats.blocks_run, stats.blocks_full, stats.saved) == (36, 54, pytest.approx(1 / 3))
    assert stats.last_depths.dtype == torch.int64 and stats.last_depths.tolist() == [4, 4]
    body = stats.to_dict()
    assert FIELDS <= set(body) and body["exits"] == {4: 9} and body["last_depths"] == [4, 4]
    assert json.loads(json.dumps(body))["saved"] == body["saved"]


def test_stats_reset_in_place(model, exits, x):
    with offramp.enable(model, "fixed", depth=4) as run:
        stats = run.stats
        model(x)
        stats.reset()
        assert run.stats is stats and stats.to_dict() == Stats().to_dict()
        assert stats.saved == 0.0 and stats.depth_mean == 0.0
        model(x[:3])
    assert stats.rows == 3 and stats.exits == {4: 3}


def test_options_are_those_of_the_public_surface():
    assert set(OPTIONS) == {"verify", "draft", "kv", "window", "strict", "rollback", "compile", "draft_vocabulary"}


@pytest.mark.parametrize("name", offramp.names(offramp.ExitPolicy))
def test_no_policy_has_an_option_of_that_name(name):
    """`enable` would keep it for itself, and the policy would never see it."""
    assert not set(inspect.signature(lookup(offramp.ExitPolicy, name)).parameters) & set(OPTIONS)


@pytest.mark.parametrize("method", ["fixed_sequence", "budget"])
@pytest.mark.parametrize("other", ["head", "model", "exits"])
def test_a_calibration_of_other_weights_or_exits_is_refused_unless_forced(model, other, method):
    """Also an uncertified one: its thresholds were measured on the other model."""
    exits = offramp.attach(model, [2, 4], head="linear")
    trace = offramp.record(model, torch.randn(300, 3, 8))
    cal = offramp.calibrate(trace, "confidence", method=method, alpha=0.5)
    with offramp.enable(model, cal) as run:
        assert run.certificate == cal.certificate
    if other == "exits":
        exits.detach()
        offramp.attach(model, [2, 3], head="linear")
    else:
        with torch.no_grad():
            weight = exits[4].proj.weight if other == "head" else model.blocks[0].up.weight
            weight.mul_(2)
    with pytest.raises(BadArgument, match="made with other weights.*offramp.calibrate.*force=True"):
        offramp.enable(model, cal)
    with offramp.enable(model, cal, force=True) as run:
        assert run.certificate is None and run.policy == cal.policy
