"""Finding things by name: one new file and nothing else."""

import sys
from dataclasses import dataclass

import pytest
import torch

import offramp
from offramp import _registry
from offramp.errors import BadArgument, OfframpError, UnknownName
from offramp.policies.confidence import Confidence
from offramp.policy import ExitPolicy

SOURCE = '''
from dataclasses import dataclass
from offramp._registry import register
from offramp.policy import ExitPolicy

@register("dropped_in")
@dataclass(frozen=True)
class DroppedIn(ExitPolicy):
    """A policy from a file of its own."""
    after: int = 1
    def step(self, state, seen):
        return seen.every(seen.index >= self.after), state
'''


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(_registry, "_classes", dict(_registry._classes))
    monkeypatch.setattr(_registry, "_folders", {k: list(v) for k, v in _registry._folders.items()})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one policy file in it."""
    (tmp_path / "third_party_policies").mkdir()
    (tmp_path / "third_party_policies" / "__init__.py").write_text("")
    (tmp_path / "third_party_policies" / "dropped_in.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "third_party_policies"
    for name in [m for m in sys.modules if m.startswith("third_party_policies")]:
        del sys.modules[name]


def test_lookup_by_file_name():
    assert _registry.lookup(ExitPolicy, "confidence") is Confidence
    assert Confidence.name == "confidence"
    assert "confidence" in offramp.names(ExitPolicy)
    assert offramp.names(ExitPolicy) == sorted(offramp.names(ExitPolicy))
    assert not [n for n in offramp.names(ExitPolicy) if n.startswith("_")]


def test_lookup_imports_only_its_own_file(monkeypatch):
    monkeypatch.setattr(_registry, "_classes", {})
    for name in [m for m in sys.modules if m.startswith("offramp.policies.")]:
        monkeypatch.delitem(sys.modules, name)
    _registry.lookup(ExitPolicy, "never")
    assert "offramp.policies.never" in sys.modules and "offramp.policies.patience" not in sys.modules


def test_add_folder_finds_a_dropped_file(package):
    with pytest.raises(UnknownName):
        offramp.policy("dropped_in")
    _registry.add_folder(ExitPolicy, package)
    _registry.add_folder(ExitPolicy, package)
    assert _registry._folders[ExitPolicy].count(package) == 1
    assert "dropped_in" in offramp.names(ExitPolicy)
    assert offramp.policy("dropped_in", after=2).after == 2


def test_a_folder_that_a_plugin_adds_when_it_loads_is_searched(package, monkeypatch):
    from offramp import _plugins

    monkeypatch.setattr(_plugins, "plugins", lambda: _registry.add_folder(ExitPolicy, package))
    assert offramp.policy("dropped_in").after == 1


def test_names_include_those_of_plugins(package, monkeypatch):
    from offramp import _plugins

    monkeypatch.setattr(_plugins, "plugins", lambda: _registry.add_folder(ExitPolicy, package))
    assert "dropped_in" in offramp.names(ExitPolicy)


def make(name="mine"):
    @offramp.register(name)
    @dataclass(frozen=True)
    class Mine(ExitPolicy):
        def step(self, state, seen):
            return seen.every(True), state

    return Mine


def test_a_dropped_class_registers_and_runs(model, x):
    make()
    assert "mine" in offramp.names(ExitPolicy)
    offramp.attach(model, at=2)
    with offramp.enable(model, "mine") as run, torch.no_grad():
        model(x)
    assert run.stats.exits == {2: 7}


def test_the_same_class_may_register_again():
    assert make() is not make()


def test_two_classes_of_one_name():
    make("confidence_2")

    @dataclass(frozen=True)
    class Other(ExitPolicy):
        def step(self, state, seen): ...

    with pytest.raises(OfframpError) as error:
        offramp.register("confidence_2")(Other)
    for part in ("'confidence_2'", "make.<locals>.Mine", "test_two_classes_of_one_name.<locals>.Other", "rename one"):
        assert part in str(error.value)


def test_register_wants_a_contract():
    with pytest.raises(OfframpError, match="int subclasses none of ExitPolicy, ExitHead"):
        offramp.register("x")(int)


def test_unknown_name_says_what_is_near_and_what_exists():
    with pytest.raises(UnknownName) as error:
        offramp.policy("confidense")
    assert "no ExitPolicy is called 'confidense'; did you mean 'confidence'?" in str(error.value)
    assert all(name in str(error.value) for name in offramp.names(ExitPolicy))


def test_unknown_option_and_missing_option():
    with pytest.raises(UnknownName, match="'confidence' has no option 'treshold'; did you mean 'threshold'?"):
        offramp.policy("confidence", treshold=0.9)
    with pytest.raises(UnknownName, match="takes .*threshold.*missing"):
        offramp.policy("confidence")


@pytest.mark.parametrize("name", [3, None, ["never"], {"policy": "never"}])
def test_a_name_is_a_string(name):
    with pytest.raises(UnknownName, match="named by a string"):
        _registry.lookup(ExitPolicy, name)


def test_names_of_no_contract():
    with pytest.raises(UnknownName, match="ExitHead"):
        offramp.names(int)


def test_policy_from_config_is_the_inverse():
    policy = offramp.policy("at_least", inner=offramp.policy("confidence", threshold=[0.5, 0.25]), depth=3)
    assert _registry.policy_from(policy.config()) == policy
    with pytest.raises(BadArgument, match='under "policy"'):
        _registry.policy_from({"threshold": 0.5})
