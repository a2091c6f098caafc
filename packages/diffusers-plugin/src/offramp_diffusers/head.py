"""What an exit of a denoiser is: a head between the state at a tap and the output layers that read it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from offramp.errors import BadArgument
from offramp.head import ExitHead, HeadContext


@dataclass(frozen=True)
class DenoiserContext(HeadContext):
    """What a head of a denoiser starts from. output: the modules that read the state after the last block, by name;
    targets: of a U-Net, what the state at a depth has to become: (channels, times as high and wide).
    """

    kind: str = ""
    output: Mapping[str, nn.Module] = field(default_factory=dict)
    targets: Mapping[int, tuple[int, int]] = field(default_factory=dict)


class DenoiserHead(ExitHead):
    """A head whose prediction is a state again, which output layers read: the model's own, or those in `layers`.

    A file in `heads/` that registers a subclass is all that a further kind of exit takes.
    """

    #: whether states are images with channels (U-Nets) and not tokens
    image: ClassVar[bool] = False
    #: whether the state must go through it, so that a schedule may only stop where one is attached
    needed: ClassVar[bool] = False

    def __init__(self, layers: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        #: output layers of the exit's own, by their names in the model; none, and the model's own are used
        self.layers = nn.ModuleDict(copy.deepcopy(dict(layers or {})))

    @property
    def acts(self) -> bool:
        """Whether the exit says anything else than the model's own output layers would of the bare state."""
        return type(self).needed or bool(self.layers)


def denoiser(base: HeadContext, head: str, instead: str) -> DenoiserContext:
    """Return the context of a denoiser; raises `BadArgument` for a model whose readout is a norm and a classifier."""
    if not isinstance(base, DenoiserContext):
        raise BadArgument(
            f"head {head!r} is for denoisers, whose own output layers read the state; this model answers with "
            f"{base.classes} classes: use {instead}"
        )
    return base


def output_layers(base: DenoiserContext) -> Mapping[str, nn.Module]:
    """Return the modules that an exit may have copies of; raises `BadArgument` where they are not to be copied now."""
    if not base.output:
        raise BadArgument(
            f"which modules read the last state of {base.kind} is not known, so an exit can have none of its own; say "
            f'it: declare({base.kind}, ModelFacts(..., output=("norm_out", "proj_out")))'
        )
    if hooked := [n for n, m in base.output.items() if m._forward_pre_hooks or "forward" in m.__dict__]:
        raise BadArgument(
            f"{', '.join(hooked)} of {base.kind} have hooks, which copies would share; attach these heads first, and "
            f"enable, offload or cast after it"
        )
    return base.output


def through(head: ExitHead, state: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Return what a head makes of a state; size: height and width that an image has to get."""
    if isinstance(head, DenoiserHead) and type(head).image:
        return head(state, size)  # type: ignore[no-any-return]
    return head(state)  # type: ignore[no-any-return]
