"""The texts of the core's errors are API: what was given, what was expected, what exists, and the line to write."""

import importlib
import json
import pickle

import pytest
import torch

import offramp
from offramp import _plugins, errors
from offramp._hookspecs import hookimpl
from offramp.attach import find
from offramp.errors import BadArgument, DamagedFile, NotAttached, OfframpError, UnknownName, UnsupportedModel
from offramp.testing.toy import ToyBackbone, ToyModel, toy_plugin


@pytest.fixture(autouse=True)
def toy():
    with toy_plugin():
        yield


@pytest.fixture
def model():
    return ToyModel().eval()


@pytest.fixture
def attached(model):
    offramp.attach(model, [2, 4])
    return model


X = torch.zeros(2, 3, 8)

#: what is wrong -> (act on a model with exits at 2 and 4, the error, parts that its message must have)
WRONG = {
    "unknown policy": (
        lambda m: offramp.enable(m, "confidnce", threshold=0.9),
        UnknownName,
        ["no ExitPolicy is called 'confidnce'", "did you mean 'confidence'?", "Known: ", "never", "patience"],
    ),
    "nothing like it": (lambda m: offramp.policy("zzz"), UnknownName, ["'zzz'; Known: ", "never"]),
    "unknown option of a policy": (
        lambda m: offramp.enable(m, "confidence", treshold=0.9),
        UnknownName,
        ["ExitPolicy 'confidence' has no option 'treshold'", "did you mean 'threshold'?", "Known: threshold"],
    ),
    "option missing": (
        lambda m: offramp.enable(m, "confidence"),
        UnknownName,
        ["'confidence' takes (threshold", "missing"],
    ),
    "unknown loss": (
        lambda m: offramp.fit(m, X, loss="distil"),
        UnknownName,
        ["no Loss", "'distil'", "'distill'", "labels"],
    ),
    "unknown option of fit": (
        lambda m: offramp.fit(m, X, temp=2),
        UnknownName,
        ["Loss 'distill' has no option 'temp'", "temperature"],
    ),
    "unknown key of the flag": (
        lambda m: (setattr(m.config, "early_exit", {"policy": "never", "verfy": True}), offramp.enable(m)),
        UnknownName,
        ["early_exit with policy 'never' has no option 'verfy'", "did you mean 'verify'?", "exits", "kv", "strict"],
    ),
    "the flag is no dict": (
        lambda m: (setattr(m.config, "early_exit", True), offramp.enable(m)),
        BadArgument,
        ['early_exit must be a dict with a "policy"', '{"policy": "confidence"}', "got True"],
    ),
    "no flag": (
        lambda m: offramp.enable(m),
        BadArgument,
        ["no policy given", 'offramp.enable(model, "confidence", threshold=0.9)', "config.early_exit = {"],
    ),
    "threshold outside": (
        lambda m: offramp.enable(m, "confidence", threshold=1.01),
        BadArgument,
        ["confidence: threshold 1.01 is outside [0, 1]", 'offramp.enable(model, "never")'],
    ),
    "threshold nan": (
        lambda m: offramp.policy("confidence", threshold=float("nan")),
        BadArgument,
        ["threshold nan", "[0, 1]"],
    ),
    "threshold no number": (
        lambda m: offramp.policy("margin", threshold="0.9"),
        BadArgument,
        ["'0.9' is not a number"],
    ),
    "too many thresholds": (
        lambda m: offramp.enable(m, "confidence", threshold=[0.9, 0.8, 0.7]),
        BadArgument,
        ["3 thresholds for 2 exits", "(at [2, 4])", "one number, or one per exit"],
    ),
    "enable twice": (
        lambda m: (offramp.enable(m, "never"), offramp.enable(m, "never")),
        NotAttached,
        ["already enabled", "run.disable()"],
    ),
    "attach twice": (
        lambda m: offramp.attach(m, 3),
        NotAttached,
        ["ToyModel already has exits at [2, 4]", "exits.detach()", "find(model).detach()"],
    ),
    "no such exit": (lambda m: find(m)[3], BadArgument, ["depth 3", "[2, 4]"]),
    "kv": (lambda m: offramp.enable(m, "never", kv="hole"), BadArgument, ["kv='hole'", "catch_up, propagate"]),
    "draft": (lambda m: offramp.enable(m, "never", draft=0), BadArgument, ["draft=0", "positive", "None to adapt"]),
    "no data": (lambda m: offramp.record(m, []), BadArgument, ["no rows", "at least one batch"]),
    "data of a wrong kind": (lambda m: offramp.record(m, 3), BadArgument, ["a tensor, a mapping", "not int"]),
    "no steps": (lambda m: offramp.fit(m, X, steps=0), BadArgument, ["steps=0", "steps=500"]),
}

#: what is wrong -> the same, on a model without exits
BARE = {
    "unknown head": (
        lambda m: offramp.attach(m, 2, head="tide"),
        UnknownName,
        ["no ExitHead is called 'tide'", "did you mean 'tied'?", "linear", "translator"],
    ),
    "unknown option of a head": (
        lambda m: offramp.attach(m, 2, head="translator", rang=4),
        UnknownName,
        ["head 'translator' has no option 'rang'", "did you mean 'rank'?"],
    ),
    "option of a head that has none": (
        lambda m: offramp.attach(m, 2, r=4),
        UnknownName,
        ["head 'tied'", "'r'", "Known: none"],
    ),
    "rank": (lambda m: offramp.attach(m, 2, head="translator", rank=0), BadArgument, ["rank 0", "rank=64"]),
    "tap outside": (
        lambda m: offramp.attach(m, [2, 6]),
        BadArgument,
        ["tap 6 is outside", "6 blocks", "1 to 5", "fraction between 0 and 1", "depth 6 is the full model"],
    ),
    "no tap": (lambda m: offramp.attach(m, []), BadArgument, ["at=[]", "taps 1 to 5", "e.g. at=[3]"]),
    "tap twice": (lambda m: offramp.attach(m, [0.5, 3]), BadArgument, ["at=[0.5, 3]", "twice", "[3, 3]"]),
    "enable without exits": (
        lambda m: offramp.enable(m, "never"),
        NotAttached,
        ["ToyModel has no exits attached", "offramp.attach(model, at=[...])", "offramp.load(model, directory)"],
    ),
    "record without exits": (lambda m: offramp.record(m, X), NotAttached, ["no exits attached", "offramp.attach"]),
    "fit without exits": (lambda m: offramp.fit(m, X), NotAttached, ["no exits attached", "offramp.attach"]),
    "not a directory": (
        lambda m: offramp.load(m, "no/such/place"),
        DamagedFile,
        ["'no/such/place' is neither a directory nor a hub id"],
    ),
    "nobody's model": (
        lambda m: offramp.attach(torch.nn.Linear(2, 2), 1),
        UnsupportedModel,
        ["no plugin claims torch.nn.modules.linear.Linear", "installed plugins: ", "toy", "pip install offramp-hf"],
    ),
}


def check(error, kind, parts):
    said = str(error.value)
    missing = [part for part in parts if part not in said]
    assert type(error.value) is kind and not missing, f"{said!r} lacks {missing}"
    assert "\n" not in said


@pytest.mark.parametrize("case", WRONG)
def test_message(attached, case):
    act, kind, parts = WRONG[case]
    with pytest.raises(OfframpError) as error:
        act(attached)
    check(error, kind, parts)


@pytest.mark.parametrize("case", BARE)
def test_message_without_exits(model, case):
    act, kind, parts = BARE[case]
    with pytest.raises(OfframpError) as error:
        act(model)
    check(error, kind, parts)
    assert not hasattr(model, "exits")


def test_detached_exits_say_how_to_attach(model):
    exits = offramp.attach(model, 2)
    exits.detach()
    with pytest.raises(NotAttached) as error:
        exits[2]
    check(error, NotAttached, ["detached", "offramp.attach(model, at=[...])"])


FILES = {
    "newer": ({"format": 99}, ["exits.json has format 99", "reads up to 1", "pip install -U offramp-core"]),
    "another architecture": (
        {"model": {"architecture": "GPT"}},
        ["'GPT'", "this model has 'ToyModel'", "offramp.attach(model, at=[2, 4], head='tied')"],
    ),
    "another width": ({"model": {"width": 64}}, ["width 64", "this model has 16", "offramp.attach"]),
    "another vocabulary": ({"model": {"classes": 50257}}, ["classes 50257", "this model has 5", "offramp.attach"]),
    "outside": ({"sha256": {"../x": "", "exits.safetensors": ""}}, ["outside its folder", "'../x'"]),
    "tampered": (
        {"sha256": {"exits.safetensors": "00"}},
        ["exits.safetensors is not the file", "exits.json", "sha256"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_message_of_a_damaged_directory(model, tmp_path, case):
    with offramp.attach(model, [2, 4]) as exits:
        exits.save(tmp_path)
    body = json.loads((tmp_path / "exits.json").read_text())
    change, parts = FILES[case]
    (tmp_path / "exits.json").write_text(json.dumps({**body, **change}))
    with pytest.raises(DamagedFile) as error:
        offramp.load(model, tmp_path)
    check(error, DamagedFile, [str(tmp_path), *parts])


def test_two_plugins_and_a_broken_one(model):
    class Also:
        @hookimpl
        def offramp_adapt(self, model):
            return ToyBackbone(model)

    report = _plugins.plugins()
    also = Also()
    report.manager.register(also, "also")
    report.loaded["also"] = also
    try:
        with pytest.raises(UnsupportedModel) as error:
            offramp.attach(model, 2)
        check(
            error,
            UnsupportedModel,
            ["plugins also and toy both claim", "offramp.testing.toy.ToyModel", "uninstall one"],
        )
    finally:
        report.manager.unregister(name="also")
        del report.loaded["also"]


def test_nan_is_counted_and_not_an_error(attached):
    x = torch.full((2, 3, 8), torch.nan)
    with offramp.enable(attached, "confidence", threshold=0.0) as run:
        attached(x)
    assert run.stats.nonfinite == 4 and run.stats.exits == {6: 2}


def test_all_errors_are_one_family_and_of_the_builtin_kinds_too():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) >= 6 and all(issubclass(k, OfframpError) for k in kinds)
    assert issubclass(UnknownName, ValueError) and issubclass(UnsupportedModel, TypeError)
    assert issubclass(NotAttached, RuntimeError) and issubclass(DamagedFile, ValueError)
    assert offramp.OfframpError is OfframpError


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(UnknownName("no x")))
    assert type(error) is UnknownName and str(error) == "no x"


def test_did_you_mean_without_anything_known():
    assert errors.did_you_mean("x", []) == " Known: none"
    assert (
        errors.did_you_mean("confidnce", ["never", "confidence"])
        == " did you mean 'confidence'? Known: confidence, never"
    )
    errors.check_options(["a"], ["a"], "x")


def test_the_evidence_says_what_a_policy_forgot_to_ask_for():
    module = importlib.import_module("offramp.policy")
    seen = module.Evidence(0, 2, True, False, hidden=torch.zeros(1, 2), stats={"top1": torch.zeros(1)})
    with pytest.raises(BadArgument) as error:
        seen["margin"]
    check(error, BadArgument, ["'margin' was not computed", "(have: top1)", "needs = frozenset({'margin'})"])
    with pytest.raises(BadArgument, match="no tensor at all"):
        module.Evidence(0, 2, True, False).every(True)
