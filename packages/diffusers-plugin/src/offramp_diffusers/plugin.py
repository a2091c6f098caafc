"""What offramp asks of a plugin, for diffusers; diffusers itself is imported only where a model of it is at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from offramp._hookspecs import hookimpl
from offramp._registry import add_folder
from offramp.backbone import Backbone
from offramp.errors import UnsupportedModel
from offramp.head import ExitHead
from offramp.loss import Loss
from offramp.policy import ExitPolicy

if TYPE_CHECKING:
    import typer

add_folder(ExitHead, "offramp_diffusers.heads")
add_folder(ExitPolicy, "offramp_diffusers.policies")
add_folder(Loss, "offramp_diffusers.losses")
#: what `offramp bench overhead --executor` calls the scheduled denoiser
EXECUTOR = "denoise"
#: where pipelines keep their denoiser; the first that is there
PARTS = ("transformer", "unet", "prior")


@hookimpl
def offramp_adapt(model: nn.Module) -> Backbone | None:
    """Claim models of diffusers and subclasses of them; raises `UnsupportedModel` for one that is not understood."""
    if not any(c.__module__.startswith("diffusers.models.") for c in type(model).__mro__):
        return None
    from offramp_diffusers.backbones.transformer import TransformerBackbone

    if isinstance(getattr(model, "up_blocks", None), nn.ModuleList) and isinstance(model.down_blocks, nn.ModuleList):
        from offramp_diffusers.backbones.unet import UNetBackbone

        return UNetBackbone(model)
    return TransformerBackbone(model)


@hookimpl
def offramp_part(whole: object) -> nn.Module | None:
    """Return the denoiser of a pipeline, or inside `torch.compile(denoiser)`; raises `UnsupportedModel` where there is
    none, or two that take turns.
    """
    inner = getattr(whole, "_orig_mod", None)
    if isinstance(inner, nn.Module) and any(c.__module__.startswith("diffusers.models.") for c in type(inner).__mro__):
        return inner
    if not any(c.__module__.startswith("diffusers.pipelines.") for c in type(whole).__mro__):
        return None
    kind = type(whole).__name__
    if isinstance(getattr(whole, "transformer_2", None), nn.Module):
        raise UnsupportedModel(
            f"{kind} has two denoisers that take turns; say which: offramp.enable(pipe.transformer, ...), and "
            f"offramp.enable(pipe.transformer_2, ...)"
        )
    found = next((m for n in PARTS if isinstance(m := getattr(whole, n, None), nn.Module)), None)
    if found is None:
        raise UnsupportedModel(f"{kind} has no denoiser under {', '.join(PARTS)}; give the model itself")
    return getattr(found, "_orig_mod", found)


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


@hookimpl
def offramp_commands(app: typer.Typer) -> None:
    """Add the commands for denoisers."""
    from offramp_diffusers.commands import add

    add(app)


@hookimpl
def offramp_overhead(executor: str | None, repeats: int, compiled: bool) -> list[dict[str, Any]] | None:
    """Return the denoiser's rows."""
    if executor not in (None, EXECUTOR):
        return None
    from offramp_diffusers.bench_overhead import denoise

    return denoise(repeats, compiled)
