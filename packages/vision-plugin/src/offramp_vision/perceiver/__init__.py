"""Dynamic Perceiver: exits on a latent branch beside a model in stages, so that they do not disturb its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from offramp._plugins import adapt
from offramp.attach import Exits
from offramp.attach import attach as attach_heads
from offramp_vision.perceiver.stages import ends_of


def attach(model: nn.Module, latents: int = 128, *, at: Sequence[int] | None = None, **options: Any) -> Exits:
    """Attach a latent branch to a timm model in stages, with exits on the branch alone.

    latents: how many there are in the first stage, half as many in each later one; at: depths of the exits, each the
    end of a stage but the last; None for those of the last two stages before it. options: depths and places, see
    `offramp_vision.heads.perceiver`. It starts as the model was, to the bit; train it with
    `offramp.fit(model, data, loss="perceiver", backbone=True)`. Raises as `offramp.attach` does, which with
    head="perceiver" is the same. Paper: Dynamic Perceiver (Han et al., ICCV 2023, arXiv 2306.11248).
    """
    where = list(ends_of(adapt(model))[:-1][-2:]) if at is None else list(at)
    return attach_heads(model, where, "perceiver", latents=latents, **options)
