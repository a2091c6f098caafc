"""U-Nets of diffusers: exits on the way up, after an up block, through a small trained map to the output layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from offramp.backbone import Observed, Tap
from offramp.errors import BadArgument, UnsupportedModel
from offramp_diffusers.backbones.transformer import TransformerBackbone
from offramp_diffusers.facts import BlockFacts, Stream, model_facts

#: down blocks return (state, states for the way up); mid and up blocks return the state
DOWN, PLAIN = BlockFacts(state=0), BlockFacts()


class UNetBackbone(TransformerBackbone):
    """A U-Net as the chain of its down blocks, its middle and its up blocks; only the last are places for exits.

    The state changes its size from block to block, so all rows of a call go equally deep.
    """

    heads: ClassVar[tuple[str, ...]] = ("upsample",)
    uniform: ClassVar[bool] = True

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
        self.first = len(down) + 2
        self.streams = [Stream.of(b, DOWN) for b in down]
        self.streams += [Stream.of(b, PLAIN) for b in (children["mid_block"], *up)]
        self.width = int(children["conv_norm_out"].num_channels)
        self.timed = True

    def blocks(self) -> list[nn.Module]:
        """Return the blocks as they stand on the model now."""
        model: Any = self.model
        return [*model.down_blocks, model.mid_block, *model.up_blocks]

    def taps(self) -> Sequence[Tap]:
        """Return one tap after every block; the layout of those after up blocks says how much smaller the state is."""
        up = list(self.model.up_blocks)  # type: ignore[arg-type]
        found = [Tap(name, i + 1, self.width, "batch inside") for i, name in enumerate(self.names[: self.first - 1])]
        for i, block in enumerate(up):
            factor = 2 ** sum(bool(getattr(later, "upsamplers", None)) for later in up[i + 1 :])
            layout = f"batch channel height/{factor} width/{factor}"
            found.append(Tap(self.names[self.first - 1 + i], self.first + i, _channels(block), layout))
        return found

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Refuse: states of a U-Net have no rows of one width."""
        raise BadArgument(
            f"the states of {type(self.model).__name__} have no common width, so there is nothing to record or to fit "
            f"here; train its heads with offramp_diffusers.tune_heads.tune_heads(model, data, scheduler)"
        )


def _channels(block: Any) -> int:
    """Return how many channels come out of an up block."""
    return int(block.resnets[-1].out_channels)
