"""Plugins are loaded one by one: a broken one is named and stops nothing."""

from types import ModuleType

import pytest

from offramp import _plugins
from offramp._hookspecs import hookimpl
from offramp.errors import UnsupportedModel
from offramp.testing import toy
from offramp.testing.toy import ToyBackbone, ToyModel


class Point:
    """An entry point, as importlib.metadata gives them."""

    def __init__(self, name, result):
        self.name, self.result = name, result

    def load(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def plugin(**hooks):
    module = ModuleType("plugin")
    for name, hook in hooks.items():
        setattr(module, name, hookimpl(hook))
    return module


def claims(model):
    return ToyBackbone(model)


def passes(model):
    return None


def adapt(model, *points):
    return _plugins.adapt(model, _plugins.load(points))


def test_one_claim():
    found = adapt(ToyModel(), Point("a", plugin(offramp_adapt=passes)), Point("b", plugin(offramp_adapt=claims)))
    assert isinstance(found, ToyBackbone)


def test_a_broken_plugin_is_named_and_the_others_work():
    points = [Point("bad", ImportError("no frame")), Point("good", plugin(offramp_adapt=claims))]
    report = _plugins.load(points)
    assert list(report.loaded) == ["good"] and list(report.broken) == ["bad"]
    assert isinstance(_plugins.adapt(ToyModel(), report), ToyBackbone)


def test_no_claim_names_the_model_and_the_plugins_also_broken_ones():
    with pytest.raises(UnsupportedModel) as error:
        adapt(ToyModel(), Point("bad", ImportError("no frame")), Point("other", plugin(offramp_adapt=passes)))
    said = str(error.value)
    for part in ("offramp.testing.toy.ToyModel", "installed plugins: other", "'bad' did not load", "no frame"):
        assert part in said
    assert "pip install" in said


def test_two_claims_name_both():
    points = [Point("one", plugin(offramp_adapt=claims)), Point("two", plugin(offramp_adapt=claims))]
    with pytest.raises(UnsupportedModel, match="plugins one and two both claim .*ToyModel; uninstall one"):
        adapt(ToyModel(), *points)


def test_a_misspelt_hook_is_found_and_later_plugins_load():
    points = [Point("a", plugin(offramp_adopt=claims)), Point("b", plugin(offramp_adapt=claims))]
    report = _plugins.load(points)
    assert "offramp_adopt" in str(report.broken["a"]) and list(report.loaded) == ["b"]
    assert isinstance(_plugins.adapt(ToyModel(), report), ToyBackbone)


def test_a_misspelt_argument_is_found():
    report = _plugins.load([Point("a", plugin(offramp_adapt=lambda modell: None)), Point("b", toy)])
    assert "modell" in str(report.broken["a"]) and list(report.loaded) == ["b"]
    assert not report.manager.has_plugin("a")


def test_a_refusal_of_its_own_model_is_passed_on():
    def refuse(model):
        raise UnsupportedModel("its blocks run twice")

    with pytest.raises(UnsupportedModel, match="run twice"):
        adapt(ToyModel(), Point("a", plugin(offramp_adapt=refuse)))


def test_toy_plugin_comes_and_goes():
    report = _plugins.plugins()
    assert "toy" in report.loaded  # the fixture's
    with toy.toy_plugin():  # nested: does nothing
        assert isinstance(_plugins.adapt(ToyModel()), ToyBackbone)
    assert isinstance(_plugins.adapt(ToyModel()), ToyBackbone)
    report.manager.unregister(name="toy")
    del report.loaded["toy"]
    with pytest.raises(UnsupportedModel), toy.toy_plugin():
        raise UnsupportedModel("x")
    assert "toy" not in report.loaded and not report.manager.has_plugin("toy")
    report.manager.register(toy, "toy")
    report.loaded["toy"] = toy
