"""Load plugins one by one; a broken one is reported by name and never stops the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pluggy
from torch import nn

from offramp import _hookspecs
from offramp.backbone import Backbone
from offramp.errors import UnsupportedModel

GROUP = "offramp"


@dataclass
class PluginReport:
    """What was found: the pluggy manager, plugins that loaded, and the exception of each that did not."""

    manager: pluggy.PluginManager
    loaded: dict[str, ModuleType] = field(default_factory=dict)
    broken: dict[str, Exception] = field(default_factory=dict)


_report: PluginReport | None = None


def plugins() -> PluginReport:
    """Return the plugins of this environment, loaded once."""
    global _report
    if _report is None:
        _report = load(entry_points(group=GROUP))
    return _report


def load(points: Any) -> PluginReport:
    """Load the given entry points, each on its own."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(_hookspecs)
    report = PluginReport(manager)
    for point in sorted(points, key=lambda p: str(p.name)):
        try:
            module = point.load()
            manager.register(module, point.name)
            manager.check_pending()
        except Exception as error:  # a plugin may fail in any way; it is named, not hidden
            report.broken[point.name] = error
            if manager.has_plugin(point.name):
                manager.unregister(name=point.name)
        else:
            report.loaded[point.name] = module
    return report


def adapt(model: nn.Module, report: PluginReport | None = None) -> Backbone:
    """Return the one backbone that a plugin claims for `model`; raises `UnsupportedModel` when none or two do."""
    report = plugins() if report is None else report
    claims: dict[str, Backbone] = {}
    for name in report.loaded:
        caller = report.manager.subset_hook_caller("offramp_adapt", [p for n, p in _others(report, name)])
        for backbone in caller(model=model):
            claims[name] = backbone
    if len(claims) == 1:
        return next(iter(claims.values()))
    what = f"{type(model).__module__}.{type(model).__qualname__}"
    if claims:
        raise UnsupportedModel(
            f"plugins {' and '.join(sorted(claims))} both claim {what}; uninstall one, they cannot both drive it"
        )
    broken = "".join(f"; plugin {n!r} did not load: {e!r}" for n, e in sorted(report.broken.items()))
    raise UnsupportedModel(
        f"no plugin claims {what}; installed plugins: {', '.join(sorted(report.loaded)) or 'none'}{broken}. "
        f"Install the plugin of its framework, e.g. pip install offramp-hf"
    )


def part(model: Any) -> Any:
    """Return the model itself, or the part that exits act on of a pipeline or of what `torch.compile` made of a model,
    as the plugin of its framework says.
    """
    if isinstance(model, nn.Module) and not hasattr(model, "_orig_mod"):
        return model
    found = plugins().manager.hook.offramp_part(whole=model)
    return model if found is None else found


def _others(report: PluginReport, name: str) -> list[tuple[str, Any]]:
    return [(n, p) for n, p in report.manager.list_name_plugin() if n != name]
