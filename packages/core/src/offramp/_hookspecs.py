"""The hooks between core and plugins: a spec is an empty function whose docstring is the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from torch import nn

if TYPE_CHECKING:
    import typer

    from offramp.backbone import Backbone

hookspec = pluggy.HookspecMarker("offramp")
hookimpl = pluggy.HookimplMarker("offramp")


@hookspec
def offramp_adapt(model: nn.Module) -> Backbone | None:
    """Return the backbone of `model`, or None when it is not yours; raise `UnsupportedModel` when it is yours but not
    understood.
    """


@hookspec(firstresult=True)
def offramp_part(whole: object) -> nn.Module | None:
    """Return the part of a pipeline that exits act on, or None when it is not yours; raise `UnsupportedModel` when it
    is yours and has none.
    """


@hookspec
def offramp_commands(app: typer.Typer) -> None:
    """Add commands to the `offramp` command line."""


@hookspec
def offramp_overhead(executor: str | None, repeats: int, compiled: bool) -> list[dict[str, Any]] | None:
    """Return the rows of `offramp bench overhead` of your executor, as `offramp.bench_overhead.row` makes them; None
    when it is not the one asked for (None: all are). compiled: measure the compiled path too, where there is one.
    """


@hookspec
def offramp_watch(loaded: Callable[[nn.Module], None]) -> Callable[[], None] | None:
    """Call `loaded(model)` for every model your framework loads from now on; return the undo."""


@hookspec
def offramp_fetch(source: str) -> Path | None:
    """Return the folder of the model-hub id `source` on this machine, fetched if needed; None when your hub has no
    such id.
    """
