"""What offramp asks this plugin: the backbone of a model, and to be told of every model that is loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from offramp._hookspecs import hookimpl
from offramp._registry import add_folder
from offramp.backbone import Backbone
from offramp.draft import DraftRule
from offramp.errors import UnsupportedModel
from offramp.head import ExitHead

if TYPE_CHECKING:
    import typer

#: what `offramp bench overhead --executor` calls the windowed decoder
EXECUTOR = "decode"

add_folder(ExitHead, "offramp_hf.heads")
add_folder(DraftRule, "offramp_hf.drafting")


@hookimpl
def offramp_adapt(model: nn.Module) -> Backbone | None:
    """Return the backbone of a transformers model by its structure, None for a model of another library.

    Raises `UnsupportedModel` with the reason when the structure is not understood.
    """
    bases = [c for c in type(model).__mro__ if c.__module__.split(".")[0] == "transformers"]
    if not bases:
        return None
    what = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise UnsupportedModel(
            f"{what} wraps the model that exits go on; adapters stay in it: offramp.attach(model.get_base_model(), ...)"
        )
    if not any(c.__name__ == "PreTrainedModel" for c in bases):
        raise UnsupportedModel(f"{what} is a part of a transformers model; attach exits to the whole model")
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        from offramp_hf.backbones.encoder_decoder import EncoderDecoder

        return EncoderDecoder(model)
    if model.can_generate():  # type: ignore[operator]
        from offramp_hf.backbones.decoder import Decoder

        return Decoder(model)
    from offramp_hf.backbones.encoder import Encoder

    return Encoder(model)


@hookimpl
def offramp_commands(app: typer.Typer) -> None:
    """Add the commands for language models and encoders."""
    from offramp_hf.commands import add

    add(app)


@hookimpl
def offramp_overhead(executor: str | None, repeats: int, compiled: bool) -> list[dict[str, Any]] | None:
    """Return the decoder's rows; its recordings are what compiled blocks are elsewhere, so it has no others."""
    if executor not in (None, EXECUTOR):
        return None
    from offramp_hf.bench_overhead import decode

    return decode(repeats)


@hookimpl
def offramp_fetch(source: str) -> Path:
    """Return the folder of an exits directory on the model hub, fetched as every other model file is."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))


@hookimpl
def offramp_watch(loaded: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Call `loaded` for every model that `from_pretrained` returns with an `early_exit` config; returns the undo."""
    from offramp.auto import WhenImported  # late: importing offramp.auto is what turns watching on

    watch = Watch(loaded)
    waiting = WhenImported("transformers.modeling_utils", watch.start)

    def undo() -> None:
        waiting.remove()
        watch.stop()

    return undo


def has_flag(model: Any) -> bool:
    """Whether the model's config or generation config carries `early_exit`; looking costs nothing, adapting does."""
    configs = (getattr(model, name, None) for name in ("config", "generation_config"))
    return any(getattr(config, "early_exit", None) is not None for config in configs)


class Watch:
    """Puts a wrapper around `PreTrainedModel.from_pretrained` and takes it away again."""

    def __init__(self, loaded: Callable[[nn.Module], None]) -> None:
        self.loaded = loaded
        self.owner: Any = None
        self.original: Any = None
        self.ours: Any = None

    def start(self, module: ModuleType) -> None:
        """Wrap the loader of the module `transformers.modeling_utils`."""
        self.owner = module.PreTrainedModel
        self.original = self.owner.__dict__["from_pretrained"]
        load = self.original.__func__

        @functools.wraps(load)
        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            found = load(cls, *args, **kwargs)
            model = found[0] if isinstance(found, tuple) else found  # (model, info) with output_loading_info=True
            if self.owner is not None and has_flag(model):
                self.loaded(model)
            return found

        self.ours = classmethod(from_pretrained)
        self.owner.from_pretrained = self.ours

    def stop(self) -> None:
        """Put the loader back; when someone wrapped it after us, ours stays inside theirs and does nothing any more."""
        owner, self.owner = self.owner, None
        if owner is not None and owner.__dict__["from_pretrained"] is self.ours:
            owner.from_pretrained = self.original
