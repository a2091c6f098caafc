"""Everything that touches timm's own machinery: importing it, watching `create_model`, the flag in `pretrained_cfg`."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from torch import nn

from offramp.errors import BadArgument

FLAG = "early_exit"
#: timm re-exports `create_model` under these names; all must be the same function, before and after
PLACES = ("timm", "timm.models", "timm.models._factory")
#: where every way to a model (arguments, a local directory, the hub) turns its config into a `PretrainedCfg`
CONFIG = "timm.models._builder"


def import_timm() -> ModuleType:
    """Return timm; raises `BadArgument` with the line to run where it, or the torchvision it imports, does not load."""
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch lacks operators: RuntimeError
        if "torchvision" in str(error):
            have = f"torch {version('torch')}, torchvision {_version('torchvision')}"
            raise BadArgument(
                f"timm needs torchvision, and it does not load here ({error}; {have}): the two must be of one release; "
                f"run: pip install --force-reinstall torch torchvision"
            ) from error
        raise BadArgument(f"timm does not load here ({error}); run: pip install 'timm>=1.0'") from error


def _version(name: str) -> str:
    """Return the installed version of a library, in words."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


class Watch:
    """Replaces `timm.create_model` by one that tells about every model it made, until `off()`."""

    def __init__(self, loaded: Callable[[nn.Module], None]) -> None:
        self.loaded = loaded
        self.before: list[tuple[Any, str, Any]] = []

    def on(self, timm: ModuleType) -> None:
        """Patch timm, which has just been imported, or was already."""
        original = timm.create_model

        @functools.wraps(original)
        def create_model(*args: Any, **kwargs: Any) -> Any:
            model = original(*args, **kwargs)
            self.loaded(model)
            return model

        for name in PLACES:
            place = sys.modules.get(name)
            if place is not None and place.__dict__.get("create_model") is original:
                self._set(place, "create_model", create_model)
        builder = importlib.import_module(CONFIG)
        self._set(builder, "resolve_pretrained_cfg", _keep_flag(builder.resolve_pretrained_cfg))

    def off(self) -> None:
        """Put everything back, last one first; what someone else has replaced in the meantime is left alone."""
        while self.before:
            place, name, (original, mine) = self.before.pop()
            if place.__dict__.get(name) is mine:
                setattr(place, name, original)

    def _set(self, place: ModuleType, name: str, value: Any) -> None:
        self.before.append((place, name, (getattr(place, name), value)))
        setattr(place, name, value)


def _keep_flag(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap timm's `resolve_pretrained_cfg`, which refuses keys it does not know, so that the flag gets through it."""

    @functools.wraps(original)
    def resolve_pretrained_cfg(variant: str, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None) -> Any:
        flag = None
        given = [pretrained_cfg, pretrained_cfg_overlay]
        for i, config in enumerate(given):
            if isinstance(config, dict) and FLAG in config:
                given[i] = {k: v for k, v in config.items() if k != FLAG}
                flag = config[FLAG]
        resolved = original(variant, *given)
        if flag is not None:
            plain = resolved.to_dict
            resolved.to_dict = lambda *args, **kwargs: {**plain(*args, **kwargs), FLAG: flag}
        return resolved

    return resolve_pretrained_cfg
