"""U-Nets of diffusers: exits on the way up to the output layers, and on the way down straight across to the way up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from offramp.backbone import Observed, Tap
from offramp.blocks import Call
from offramp.errors import BadArgument, UnsupportedModel
from offramp_diffusers.backbones.transformer import TransformerBackbone
from offramp_diffusers.facts import BlockFacts, Stream, argument, model_facts

#: down blocks return (state, states for the way up); mid and up blocks return the state
DOWN, PLAIN = BlockFacts(state=0), BlockFacts()


@dataclass(frozen=True)
class DownStream(Stream):
    """A down block, which also returns `skips` states for the up block of its level."""

    skips: int = 0

    def skip(self, call: Call) -> Any:
        """Return as many states as the block would, all without extent: nothing that runs reads them, and what a
        ControlNet adds to them keeps its shape. Raises `BadArgument` for a T2I adapter's."""
        if call.kwargs.get("additional_residuals") is not None:
            raise BadArgument(
                "a T2I adapter adds to states of down blocks that an exit on the way down leaves out; choose a depth "
                "on the way up"
            )
        nothing = self.read(call).new_zeros(())
        return nothing, (nothing,) * self.skips


class UNetBackbone(TransformerBackbone):
    """A U-Net as the chain of its down blocks, its middle and its up blocks.

    A stop at depth k on the way down runs the first k blocks and the last k: the state after block k goes straight
    across to the up block of its level, and the bottom of the U does not run. A stop on the way up leaves out what is
    after it. The state changes its size from block to block, so all rows of a call go equally deep.
    """

    image: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        self.facts = model_facts(model)
        children: dict[str, Any] = dict(model.named_children())
        kind = type(model).__name__
        if missing := [n for n in (*self.facts.lists, self.facts.reader) if not isinstance(children.get(n), nn.Module)]:
            raise UnsupportedModel(f"{kind} looks like a U-Net, but has no {', '.join(missing)}")
        down, up = children["down_blocks"], children["up_blocks"]
        if len(up) < 2:
            raise UnsupportedModel(f"{kind} has {len(up)} up block, so there is no place for an exit")
        if any(hasattr(block, "skip_conv") for block in up):
            raise UnsupportedModel(f"{kind} has up blocks with a second output (skip_conv), which no exit could give")
        self.names = [f"down_blocks.{i}" for i in range(len(down))] + ["mid_block"]
        self.names += [f"up_blocks.{i}" for i in range(len(up))]
        if len(down) != len(up):
            raise UnsupportedModel(f"{kind} has {len(down)} down blocks and {len(up)} up blocks; each level needs both")
        self.streams = [_down(block) for block in down]
        self.streams += [Stream.of(b, PLAIN) for b in (children["mid_block"], *up)]
        self.width = int(children["conv_norm_out"].num_channels)
        self.timed = True

    def blocks(self) -> list[nn.Module]:
        """Return the blocks as they stand on the model now."""
        model: Any = self.model
        return [*model.down_blocks, model.mid_block, *model.up_blocks]

    def taps(self) -> Sequence[Tap]:
        """Return one tap after every block, with the channels of its state."""
        widths = [_channels(block) for block in self.blocks()]
        layout = "batch channel height width"
        return [Tap(n, i + 1, w, layout) for i, (n, w) in enumerate(zip(self.names, widths, strict=True))]

    def targets(self) -> Mapping[int, tuple[int, int]]:
        """Return what the state after a down block is in the up block of its level, and after an up block at the end:
        (channels, times as large)."""
        model: Any = self.model
        down, up = list(model.down_blocks), list(model.up_blocks)
        found = {}
        for i, block in enumerate(down):  # across to the up block that reads what the one below it made
            below = up[len(up) - 2 - i] if i + 1 < len(down) else down[-1]
            found[i + 1] = _channels(below), 2 if getattr(block, "downsamplers", None) else 1
        for i in range(len(up) - 1):
            factor = 2 ** sum(bool(getattr(later, "upsamplers", None)) for later in up[i + 1 :])
            found[len(down) + 2 + i] = self.width, factor
        return found

    def resume(self, stop: int) -> int:
        """Return where the way up goes on after a stop on the way down."""
        return self.depth - stop if stop <= self.depth // 2 else self.depth

    def size(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """Return height and width of the image that the model is called with, or an up block from the way down."""
        kind: Any = type(getattr(module, "_orig_mod", module))
        given = argument("sample" if module is self.model else "res_hidden_states_tuple", kind, args, kwargs)
        height, width = (given if module is self.model else given[-1]).shape[-2:]
        return height, width

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Refuse: states of a U-Net have no rows of one width."""
        raise BadArgument(
            f"the states of {type(self.model).__name__} have no common width, so there is nothing to record or to fit "
            f"here; train its heads with offramp_diffusers.tune_heads.tune_heads(model, data, scheduler)"
        )


def _channels(block: Any) -> int:
    """Return how many channels come out of a block."""
    return int(block.resnets[-1].out_channels)


def _down(block: Any) -> DownStream:
    """Return the stream of a down block."""
    found, inner = Stream.of(block, DOWN), getattr(block, "_orig_mod", block)
    skips = len(inner.resnets) + len(getattr(inner, "downsamplers", None) or ())
    return DownStream(found.facts, found.place, found.text_place, found.names, skips)
