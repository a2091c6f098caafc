"""Everything that touches diffusers' own machinery: watching `from_pretrained`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

#: where `ModelMixin` is made; `diffusers` itself is a lazy module that does not hold it yet when it is imported
MODELS = "diffusers.models.modeling_utils"


class Watch:
    """Replaces `ModelMixin.from_pretrained` by one that tells about every model it loaded, until `off()`."""

    def __init__(self, loaded: Callable[[nn.Module], None]) -> None:
        self.loaded = loaded
        self.undo: Callable[[], None] | None = None

    def on(self, models: ModuleType) -> None:
        """Patch the class; pipelines load their components through it too."""
        mixin = models.ModelMixin
        original = mixin.__dict__["from_pretrained"]
        loaded = self.loaded

        @functools.wraps(original.__func__)
        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            made = original.__func__(cls, *args, **kwargs)
            loaded(made[0] if isinstance(made, tuple) else made)  # (model, info) with output_loading_info=True
            return made

        mine: Any = classmethod(from_pretrained)

        def undo() -> None:
            if mixin.__dict__.get("from_pretrained") is mine:
                mixin.from_pretrained = original

        mixin.from_pretrained = mine
        self.undo = undo

    def off(self) -> None:
        """Put diffusers' own method back."""
        if self.undo is not None:
            self.undo()
        self.undo = None
