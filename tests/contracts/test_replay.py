"""Every policy does to a trace what it does to a model's own calls: the same rows leave, with the same answers."""

import pytest
import torch

import offramp
from offramp._registry import lookup
from offramp.gating import gate_of
from offramp.policy import ExitPolicy, SchedulePolicy
from offramp.testing import ContractError
from offramp.testing.policies import check_replay
from offramp.testing.toy import ToyModel, toy_plugin

AT = (1, 2, 3, 5)
#: settings at which some rows of the toy leave early, some late and some not at all; other policies as in their example
OPTIONS = {
    "patience": {"patience": 1},
    "gate": {"threshold": 0.5},
    "speculative_gate": {"threshold": 0.5},
    "quantile_halting": {"threshold": 0.5},
    "learned_to_exit": {"threshold": 0.5},
    "beta_mixture": {"threshold": 0.1},
    "confidence": {"threshold": 0.35},
    "margin": {"threshold": 0.1},
    "energy": {"threshold": -1.9},
    "entropy": {"threshold": 1.45},
    "saturation": {"threshold": 0.85},
    "agreement": {"threshold": 0.3},
    "jei": {"threshold": 0.3},
    "all_of": {"policies": [{"policy": "confidence", "threshold": 0.3}, {"policy": "patience", "patience": 1}]},
    "any_of": {"policies": [{"policy": "confidence", "threshold": 0.4}, {"policy": "patience", "patience": 3}]},
    "at_least": {"inner": {"policy": "confidence", "threshold": 0.3}, "depth": 3},
    "tempered": {"inner": {"policy": "confidence", "threshold": 0.3}, "temperature": 1.5},
}
#: decaying looks at positions of a text, of which one call of a classifier has none; uncertainty is denoisers'
NAMES = [
    n
    for n in offramp.names(ExitPolicy)
    if n not in ("decaying", "uncertainty") and not issubclass(lookup(ExitPolicy, n), SchedulePolicy)
]

@pytest.fixture(autouse=True)
def toy():
    with toy_plugin():
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ToyModel().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.mul_(8)
        model.head.weight.mul_(2)
    return model


def attach(model, policy):
    """Exits with what the policy reads; its gates say different things."""
    gate = next(filter(None, map(gate_of, sorted(policy.statistics()))), None)
    exits = offramp.attach(model, AT, head="speculative" if "gate" in policy.statistics() else "tied", gate=gate)
    with torch.no_grad():
        for name, value in model.exits.named_parameters():
            if "gate" in name and not name.endswith("0.weight"):
                value.add_(torch.randn(value.shape) * 0.7)
    return exits


def rows(count=60):
    x = torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(2))
    x[7] = float("nan")
    return x


def made(name):
    return lookup(ExitPolicy, name).example(AT, 5, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_simulation_decides_as_the_run(model, name):
    policy = made(name)
    attach(model, policy)
    outcome = check_replay(policy, model, rows(), batch_size=7)
    assert outcome.depths[7] == 6  # a row of NaN runs to the end
    if name in OPTIONS:
        assert len(outcome.depths.unique()) > 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("patience", {"patience": 2, "tolerance": 0.9}),
        ("agreement", {"threshold": [0.1, 0.2, 0.6, 0.3], "distance": "max", "outputs": (0, 3)}),
        ("agreement", {"threshold": 0.02, "distance": "cosine"}),
        ("quantile_halting", {"rule": "sample", "seed": 5}),
        ("quantile_halting", {"threshold": [0.9, 0.8, 0.7, 0.6]}),
        ("jei", {"threshold": 0.6, "recursion": "single"}),
        ("entropy", {"threshold": 0.9, "normalised": True}),
    ],
)
def test_with_other_options(model, name, options):
    policy = offramp.policy(name, **options)
    attach(model, policy)
    assert len(check_replay(policy, model, rows(), batch_size=9).depths.unique()) > 1


@pytest.mark.parametrize("head", ["tied", "linear"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"), [("patience", {"patience": 1, "tolerance": 0.2}), ("agreement", {"threshold": 0.15})]
)
def test_numbers_instead_of_classes(head, outputs, name, options):
    torch.manual_seed(1)
    model = ToyModel(classes=outputs).eval()
    offramp.attach(model, AT, head=head)
    outcome = check_replay(offramp.policy(name, **options), model, rows())
    assert outcome.depths[7] == 6 and len(outcome.depths.unique()) > 1


@pytest.mark.parametrize("name", ["confidence", "entropy", "margin", "energy", "patience"])
def test_a_policy_of_classes_is_refused_on_one_number(name):
    model = ToyModel(classes=1).eval()
    offramp.attach(model, AT)
    policy = offramp.policy(name, **({"patience": 1} if name == "patience" else {"threshold": 0.5}))
    with pytest.raises(offramp.OfframpError, match="heads with one output have no classes.*tolerance"):
        offramp.enable(model, policy)
    assert "_offramp_run" not in model.__dict__
    trace = offramp.record(model, rows(9), logits=True)
    with pytest.raises(offramp.OfframpError, match="heads with one output have no classes"):
        offramp.simulate(trace, policy)


def test_a_difference_is_found(model, monkeypatch):
    offramp.attach(model, AT)
    policy = offramp.policy("confidence", threshold=0.35)
    monkeypatch.setattr("offramp.testing.policies.simulate", lambda trace, _: offramp.simulate(trace, "never"))
    with pytest.raises(ContractError, match="the simulation at"):
        check_replay(policy, model, rows())
