"""What offramp asks of a plugin, for diffusers; diffusers itself is imported only where a model of it is at hand."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from offramp._hookspecs import hookimpl
from offramp._registry import add_folder
from offramp.backbone import Backbone
from offramp.head import ExitHead

add_folder(ExitHead, "offramp_diffusers.heads")


@hookimpl
def offramp_adapt(model: nn.Module) -> Backbone | None:
    """Claim models of diffusers and subclasses of them; raises `UnsupportedModel` for one that is not understood."""
    if not any(c.__module__.startswith("diffusers.models.") for c in type(model).__mro__):
        return None
    from offramp_diffusers.backbones.dit import DitBackbone

    return DitBackbone(model)


@hookimpl
def offramp_watch(loaded: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Call `loaded(model)` for every model or pipeline component that diffusers loads from now on; return the undo."""
    from offramp.auto import WhenImported  # importing it switches it on: only it may call this
    from offramp_diffusers._compat import MODELS, Watch

    watch = Watch(loaded)
    waiting = WhenImported(MODELS, watch.on)

    def undo() -> None:
        waiting.remove()
        watch.off()

    return undo
