"""What offramp asks of a plugin, for timm; timm itself is imported only where a model of it is at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from offramp._hookspecs import hookimpl
from offramp._registry import add_folder
from offramp.backbone import Backbone
from offramp.head import ExitHead
from offramp.loss import Loss

if TYPE_CHECKING:
    import typer

add_folder(ExitHead, "offramp_vision.heads")
add_folder(Loss, "offramp_vision.losses")


@hookimpl
def offramp_adapt(model: nn.Module) -> Backbone | None:
    """Claim models of timm and subclasses of them; raises `UnsupportedModel` for a structure that is not understood."""
    if not any(c.__module__.startswith("timm.") for c in type(model).__mro__):
        return None
    from offramp_vision.backbones._adapt import backbone_of

    return backbone_of(model)


@hookimpl
def offramp_commands(app: typer.Typer) -> None:
    """Add the commands for image classifiers."""
    from offramp_vision.commands import add

    add(app)


@hookimpl
def offramp_watch(loaded: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Call `loaded(model)` for every model that `timm.create_model` builds from now on; return the undo."""
    from offramp.auto import WhenImported  # importing it switches it on: only it may call this
    from offramp_vision._compat import Watch

    watch = Watch(loaded)
    waiting = WhenImported("timm", watch.on)

    def undo() -> None:
        waiting.remove()
        watch.off()

    return undo
