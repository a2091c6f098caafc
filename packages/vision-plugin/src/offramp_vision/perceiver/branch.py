"""The latent branch itself: goes along with every forward of the model, and is cut when images leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.blocks import Call, state_of, with_state
from offramp.errors import NotAttached
from offramp_vision.heads.perceiver import Perceiver
from offramp_vision.layouts import FIRST, map_of
from offramp_vision.perceiver.parts import Give, Mix, Take, attention


@dataclass
class Flow:
    """Where one forward is: its latents [rows, count, width], what the last exit read of them, and that exit's depth.
    """

    latents: Tensor
    read: Tensor | None = None
    depth: int = 0

    def cut(self, kept: Tensor) -> None:
        """Keep these rows."""
        self.latents = self.latents[kept]
        self.read = None if self.read is None else self.read[kept]

    def __deepcopy__(self, memo: Any) -> None:
        """Leave a copy of the model without it: no forward of that one is on its way."""


class Branch(nn.Module):
    """Latents beside the stages: in stage i they look at the map that comes into it, and its last map looks at them.

    The latents of stage i + 1 look at what stage i gives, so they are ready, and can be read, before it runs. widths:
    of the map into each stage and of the last; grids: of those maps; ends: depths at which stages end; heads: the exits
    by depth; layout: of the maps; classes: of the prediction.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[Sequence[int]],
        ends: Sequence[int],
        heads: Mapping[int, Perceiver],
        layout: str,
        classes: int,
        latents: int,
        depths: Sequence[int],
        places: int,
    ) -> None:
        super().__init__()
        self.ends, self.heads, self.layout = tuple(ends), dict(heads), layout
        self.start = nn.Parameter(nn.init.trunc_normal_(torch.empty(latents, widths[0]), std=0.02, a=-2, b=2))
        steps, last = range(len(ends)), len(ends) - 1
        self.take = nn.ModuleList(Take(widths[i], [min(places, side) for side in grids[i]]) for i in steps)
        self.think = nn.ModuleList(attention(widths[i], depths[i], i) for i in steps)
        self.mix = nn.ModuleList(Mix(latents >> i, widths[i], widths[i + 1]) for i in steps[:-1])
        self.give = nn.ModuleList(Give(widths[i + 1], widths[min(i + 1, last)]) for i in steps)
        self.merge = Perceiver(widths[last], classes, bool(heads))
        nn.init.zeros_(self.merge.proj.weight)
        nn.init.zeros_(self.merge.proj.bias)
        self.flow: Flow | None = None

    def block(self, index: int, call: Call) -> Any:
        """Run a block of the model; the latents start before the first, and go on at the end of every stage."""
        if index == 0:
            start = self.start.repeat(len(call.hidden), 1, 1)  # torch's counter of operations stumbles over `expand`
            self.flow = Flow(self.look(0, start, call.hidden))
        output = call.run()
        if index + 1 in self.ends:
            output = with_state(output, self.after(self.ends.index(index + 1), state_of(output)))
        return output

    def look(self, stage: int, latents: Tensor, state: Tensor) -> Tensor:
        """Return the latents of a stage, after a look at the map that comes into it, and some thought."""
        out: Tensor = self.think[stage](self.take[stage](latents, map_of(self.layout, 0, (), state)))
        return out

    def after(self, stage: int, state: Tensor) -> Tensor:
        """Return the map at the end of a stage after its look at the latents, and let those go on to the next."""
        flow, more = self.now(), stage + 1 < len(self.ends)
        latents = self.mix[stage](flow.latents) if more else flow.latents
        given = self.give[stage](map_of(self.layout, 0, (), state), latents)
        state = state + (given if self.layout == FIRST else given.permute(0, 2, 3, 1)).to(state.dtype)
        if more:
            flow.latents = self.look(stage + 1, latents, state)
        if (depth := self.ends[stage]) in self.heads:
            flow.read, flow.depth = self.evidence(), depth
        return state

    def now(self) -> Flow:
        """Return the forward that is on its way; raises `NotAttached` where a block was called outside of one."""
        if self.flow is None:
            raise NotAttached("latents begin with the first block: call the whole model, or first exits.detach()")
        return self.flow

    def evidence(self) -> Tensor:
        """Return what a readout has of the latents now: their mean, and beside it what the exit before it says."""
        flow = self.now()
        mean = flow.latents.mean(1)
        return mean if flow.read is None else torch.cat([mean, self.heads[flow.depth](flow.read).to(mean.dtype)], -1)

    def answer(self, index: int, call: Call) -> Any:
        """Add what the latents say to what the model's classifier says; outside a forward that is nothing."""
        logits = call.run()
        if self.flow is None:
            return logits
        said = self.merge(self.evidence())
        self.flow = None
        return logits + said.to(logits.dtype)
