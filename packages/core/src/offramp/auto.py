"""After `import offramp.auto`, every model loaded with an `early_exit` config comes enabled; `offramp.auto.off()`
undoes it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from offramp._plugins import adapt, plugins
from offramp.enable import RUN, enable
from offramp.errors import UnsupportedModel

_undo: list[Callable[[], None]] = []


def on() -> None:
    """Watch every framework that has a plugin; does nothing the second time."""
    if not _undo:
        _undo.extend(u for u in plugins().manager.hook.offramp_watch(loaded=loaded) if u is not None)


def off() -> None:
    """Stop watching; models that are enabled stay enabled."""
    while _undo:
        _undo.pop()()


def loaded(model: nn.Module) -> None:
    """Enable `model` when its config has an `early_exit` dict; a wrong one is an error, not a silence."""
    if RUN in model.__dict__:
        return
    try:
        backbone = adapt(model)
    except UnsupportedModel as error:
        if getattr(getattr(model, "config", None), "early_exit", None) is not None:
            warnings.warn(f"early_exit in the config of {type(model).__name__} is not used: {error}", stacklevel=2)
        return
    if backbone.flag() is not None:
        enable(model)


class WhenImported(importlib.abc.MetaPathFinder):
    """Calls `act(module)` as soon as a module is imported, or now if it already is; `remove()` stops waiting."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self.act, self.looking = name, act, False
        if name in sys.modules:
            act(sys.modules[name])
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as Python would and act after it has run."""
        if name != self.name or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.remove()
            self.act(sys.modules.get(self.name, module))  # lazy frameworks put another module in their place

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def remove(self) -> None:
        """Stop waiting."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"offramp.auto has on() and off(), not {name!r}")


on()
