"""After `import offramp.auto` models come enabled, and `off()` undoes that."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from torch import nn

import offramp
from offramp import _plugins
from offramp._hookspecs import hookimpl
from offramp.auto import WhenImported
from offramp.enable import RUN
from offramp.errors import BadArgument
from offramp.testing.toy import ToyModel

auto = importlib.import_module("offramp.auto")


class Framework:
    """A framework whose `load()` tells those who watch."""

    def __init__(self):
        self.watchers, self.watched = [], 0

    @hookimpl
    def offramp_watch(self, loaded):
        self.watchers.append(loaded)
        self.watched += 1
        return lambda: self.watchers.remove(loaded)

    def load(self, model):
        for watcher in self.watchers:
            watcher(model)
        return model


@pytest.fixture
def framework():
    auto.off()
    plugin = Framework()
    report = _plugins.plugins()
    report.manager.register(plugin, "framework")
    yield plugin
    auto.off()
    report.manager.unregister(name="framework")


def flagged(**flag):
    model = ToyModel().eval()
    offramp.attach(model, [2, 4])
    model.config.early_exit = flag
    return model


def test_on_enables_what_is_loaded_and_off_undoes_that(framework, x):
    auto.on()
    auto.on()
    assert framework.watched == 1
    model = framework.load(flagged(policy="fixed", depth=2))
    model(x)
    assert model.__dict__[RUN].stats.exits == {2: 7}
    auto.off()
    auto.off()
    assert not framework.watchers and model.__dict__[RUN].enabled
    assert RUN not in framework.load(flagged(policy="never")).__dict__
    auto.on()
    assert RUN in framework.load(flagged(policy="never")).__dict__


def test_a_model_without_the_flag_is_left_alone(framework, marks):
    auto.on()
    model = ToyModel()
    before = marks(model)
    framework.load(model)
    assert marks(model) == before


def test_a_model_that_is_enabled_already_is_left_alone(framework):
    auto.on()
    model = flagged(policy="fixed", depth=2)
    run = offramp.enable(model, "never")
    assert framework.load(model).__dict__[RUN] is run


def test_a_wrong_flag_is_an_error_and_not_a_silence(framework):
    auto.on()
    with pytest.raises(BadArgument, match="did you mean 'fixed'"):
        framework.load(flagged(policy="fixd", depth=2))
    with pytest.raises(BadArgument, match="must be a dict"):
        model = ToyModel()
        model.config.early_exit = "fixed"
        framework.load(model)


def test_a_flag_on_a_model_that_nobody_claims_warns(framework):
    auto.on()
    other = type("Plain", (nn.Module,), {})()
    other.config = SimpleNamespace(early_exit={"policy": "never"})
    with pytest.warns(UserWarning, match="early_exit in the config of Plain is not used: no plugin claims"):
        framework.load(other)
    del other.config
    framework.load(other)  # and without the flag it is nobody's business


def test_a_wrong_name_in_auto():
    with pytest.raises(AttributeError, match=r"offramp.auto has on\(\) and off\(\), not 'onn'"):
        auto.onn()


def test_importing_it_turns_it_on():
    code = "import offramp, sys; assert 'offramp.auto' not in sys.modules; import offramp.auto as a; a.off(); a.on()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def late(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("import late_other\nx = 1\n")
    (tmp_path / "late_other.py").write_text("")
    (tmp_path / "lazy_module.py").write_text(
        "import sys\nfrom types import ModuleType\nm = sys.modules[__name__] = ModuleType(__name__)\nm.lazy = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield
    assert sys.meta_path == finders
    for name in ("late_module", "late_other", "lazy_module"):
        sys.modules.pop(name, None)


def test_when_imported_acts_after_the_module_has_run(late):
    seen = []
    WhenImported("late_module", lambda module: seen.append(module.x))
    import late_other  # noqa: F401

    assert not seen
    import late_module  # noqa: F401

    assert seen == [1]


def test_when_imported_acts_now_if_it_already_is(late):
    import late_module

    seen = []
    WhenImported("late_module", seen.append).remove()
    assert seen == [late_module]


def test_when_imported_sees_what_a_lazy_module_put_in_its_place(late):
    seen = []
    WhenImported("lazy_module", lambda module: seen.append(module.lazy))
    import lazy_module  # noqa: F401

    assert seen == [True]


def test_when_imported_stops_waiting(late):
    seen = []
    waiting = WhenImported("late_module", seen.append)
    waiting.remove()
    waiting.remove()
    import late_module  # noqa: F401

    assert not seen


def test_when_imported_of_a_module_that_is_not_there(late):
    waiting = WhenImported("no_such_module_at_all", print)
    with pytest.raises(ModuleNotFoundError):
        import no_such_module_at_all  # noqa: F401
    waiting.remove()
