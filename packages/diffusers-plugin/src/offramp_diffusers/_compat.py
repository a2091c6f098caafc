"""Everything that touches diffusers' own machinery: its table of blocks, its hooks, and `from_pretrained`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from offramp.blocks import BlockHook
from offramp.errors import BadArgument

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


def block_metadata(cls: type) -> tuple[int | None, int | None, str, str] | None:
    """Return what diffusers' own table says of a block class: (place of the state in the returned tuple or None for a
    bare tensor, place of the text or None, their argument names); None where it has no entry.
    """
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        found = TransformerBlockRegistry.get(cls)
    except ValueError:  # "not registered"
        return None
    state, text = found.return_hidden_states_index, found.return_encoder_hidden_states_index
    names = found.hidden_states_argument_name, found.encoder_hidden_states_argument_name
    return (None if text is None else state), text, *names


#: diffusers' caches by the names of their hooks on blocks; each stands in for the block that it is on
CACHES = {
    "fbc_leader_block_hook": "FirstBlockCache",
    "fbc_block_hook": "FirstBlockCache",
    "mag_cache_leader_block_hook": "MagCache",
    "mag_cache_block_hook": "MagCache",
}


def cached(block: nn.Module) -> str | None:
    """Return which cache, diffusers' or `deep_cache`, has a hook on this block that stands in for it, or None."""
    if isinstance(hook := getattr(block.__dict__.get("forward"), "__self__", None), BlockHook):
        if name := getattr(getattr(hook.handler, "__self__", None), "cache", None):
            return str(name)
    registry = block.__dict__.get("_diffusers_hook")
    return next((CACHES[n] for n in getattr(registry, "hooks", {}) if n in CACHES), None)


def take_out(module: nn.Module, mine: Any, original: Any) -> bool:
    """Take a forward out of the middle of diffusers' chain of hooks on a module; whether it was there.

    Hooks that were registered on top of it keep running: they then call `original`.
    """
    found = False
    for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        if reference.original_forward == mine:
            reference.original_forward, found = original, True
        if reference.forward == mine:
            reference.forward, found = original, True
    return found


def covered(outer: Any, mine: Any) -> bool:
    """Whether a forward that stands on a module leads to ours, through diffusers' or accelerate's wrappers."""
    for _ in range(32):  # no chain of hooks is this long
        while isinstance(hook := getattr(outer, "__self__", None), BlockHook) and outer != mine:
            outer = hook.original  # of a capture or a window on top
        if outer == mine:
            return True
        registry = None
        if (args := getattr(outer, "args", ())) and isinstance(args[0], nn.Module):  # a partial of (module,)
            registry = args[0].__dict__.get("_diffusers_hook")
            inner = args[0].__dict__.get("_old_forward")
            if inner == mine:
                return True
        for reference in getattr(registry, "_fn_refs", ()):
            if mine in (reference.original_forward, reference.forward):
                return True
        outer = getattr(outer, "__wrapped__", None)
        if outer is None:
            return False
    return False


@contextmanager
def first_block_cache(model: nn.Module, threshold: float) -> Iterator[None]:
    """Run with diffusers' FirstBlockCache on a model while the context lasts, also on one without `enable_cache`."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
    with _in_context(model, ("fbc_block_hook", "fbc_leader_block_hook")):
        yield


@contextmanager
def mag_cache(model: nn.Module, threshold: float, ratios: Sequence[float]) -> Iterator[None]:
    """Run with diffusers' MagCache; ratios: how much the residual of all blocks grows at each of the solver's steps."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    apply_mag_cache(
        model, MagCacheConfig(threshold=threshold, num_inference_steps=len(ratios), mag_ratios=list(ratios))
    )
    with _in_context(model, ("mag_cache_block_hook", "mag_cache_leader_block_hook")):
        yield


@contextmanager
def _in_context(model: nn.Module, hooks: Sequence[str]) -> Iterator[None]:
    """Give new hooks a context, as `cache_context` of models that have one does, and take them off in the end."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.invalidate_child_registries_cache()  # a list made before these hooks would leave them without a context
    try:
        _set_cache_context(model, CacheContext("sample"))
        yield
    finally:
        for name in hooks:
            registry.remove_hook(name, recurse=True)
        registry.invalidate_child_registries_cache()


def check_hooks(hooks: Sequence[BlockHook], block: nn.Module, head: str | None) -> None:
    """Raise where another library took our hooks off the blocks, so that the full model would run and nobody would
    know, and where heads would not get the states of a cache that is on top: it reuses what came of another depth.

    block: the first one; head: the name of heads that change states, None where there are none.
    """
    if head is not None and (cache := cached(block)) is not None:
        raise BadArgument(
            f"{cache} is on top of exits with heads {head!r}: what it adds at a step that it skips was kept at "
            f"another, maybe of another depth, and these heads are trained for one depth each. Take one of the two "
            f"off; caches work with exits without maps of their own (head='passthrough', or none)"
        )
    for hook in (*hooks[:1], *hooks[-1:]):
        now = hook.module.__dict__.get(hook.place)
        if now is None or (now != hook.forward and not covered(now, hook.forward)):
            raise BadArgument(
                "another library took offramp's hooks off the blocks of this model after offramp.enable; enable "
                "once more: run.disable(); offramp.enable(...)"
            )
        if hook.place != "forward" and (cache := cached(hook.module)) is not None:
            raise BadArgument(
                f"{cache} is inside blocks that were compiled in place, and exits around it keep it from seeing "
                f"its last block; leave one out, or compile with blocks[i] = torch.compile(block) instead"
            )
