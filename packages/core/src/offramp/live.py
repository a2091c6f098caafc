"""Rows for training with the model running in every step: with it, or for heads that read whole sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.attach import Exits
from offramp.backbone import Observed
from offramp.blocks import Call, state_of, with_state
from offramp.errors import BadArgument
from offramp.policy import SchedulePolicy
from offramp.record import batches, evaluating
from offramp.schedule import runs


class Live:
    """Observations batch by batch, endlessly; a tensor or mapping of tensors is shuffled anew each time round.

    data: as for `fit`; the first batch, as it comes, is what `agreement` is measured on. layer_dropout: rate of the
    last block; block l of L has rate * (2^(l / (L - 1)) - 1), drawn per sample (arXiv 2404.16710).
    schedule: at each place only the blocks that it gives to that generated token change the state (arXiv 2307.02628).
    Keys and values of places that skip a block stay in it, but only later places look at them, and those skip it too.
    frozen: only the heads are trained, the model runs without gradients and in eval mode. taps: further depths whose
    states are wanted, in `Observed.states` with those of all depths.
    """

    def __init__(
        self,
        exits: Exits,
        data: Any,
        batch_size: int,
        seed: int,
        layer_dropout: float,
        schedule: SchedulePolicy | None = None,
        frozen: bool = False,
        taps: Sequence[int] = (),
    ) -> None:
        self.exits, self.data, self.batch_size, self.schedule = exits, data, batch_size, schedule
        self.frozen, self.taps = frozen, taps
        #: which blocks run at each place of the batch [batch, token, depth]
        self.runs: Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)
        depth = exits.backbone.depth
        self.rates = [layer_dropout * (2 ** (i / max(1, depth - 1)) - 1) for i in range(depth)]
        first = next(iter(batches(data, batch_size)), None)
        if first is None:
            raise BadArgument("the data holds no rows; give at least one batch")
        self.first = first

    def __iter__(self) -> Iterator[Observed]:
        seen, before = 0, -1
        while seen > before:  # an iterator that is used up yields nothing the second time
            before = seen
            for batch in batches(self._shuffled(), self.batch_size):
                yield self.observe(batch)
                seen += 1
        raise BadArgument(f"the data ended after {seen} batches; give an iterable that can be gone through again")

    def _shuffled(self) -> Any:
        tensors = self.data.values() if isinstance(self.data, Mapping) else [self.data]
        sizes = [len(t) for t in tensors if isinstance(t, Tensor)]
        if not sizes:
            return self.data
        order = torch.randperm(sizes[0], generator=self.generator)
        if isinstance(self.data, Tensor):
            return self.data[order]
        return {k: v[order] if isinstance(v, Tensor) else v for k, v in self.data.items()}

    def observe(self, batch: Any) -> Observed:
        """Run the model on one batch; not frozen, in train mode, with layer dropout and schedule."""
        exits, model, backbone = self.exits, self.exits.model, self.exits.backbone
        if self.frozen:
            with torch.no_grad():
                return exits.observe(batch)
        if self.schedule is not None:
            self.runs = runs(self.schedule, backbone.generated(batch), backbone.depth)
        undo = backbone.chain().install(self._block) if any(self.rates) or self.schedule is not None else None
        model.train()
        try:
            return exits.observe(batch, self.taps)
        finally:
            model.eval()
            if undo is not None:
                undo()

    def _block(self, index: int, call: Call) -> Any:
        output, rate = call.run(), self.rates[index]
        state = kept = state_of(output)
        if rate:
            shape = (state.shape[0], *[1] * (state.dim() - 1))
            keep = torch.rand(shape, generator=self.generator).to(state.device) >= rate
            kept = torch.where(keep, state, call.hidden)
        if self.runs is not None:
            kept = torch.where(self.runs[..., index, None], kept, call.hidden)
        return output if kept is state else with_state(output, kept)

    @torch.no_grad()
    def agreement(self) -> dict[int, float]:
        """Return on which share of the first batch's rows each exit says what the full model says."""
        with evaluating(self.exits.model):
            seen = self.exits.observe(self.first)
            best = self.exits.backbone.context().readout(seen.final).argmax(-1)
            inputs = self.exits.inputs(seen)
            answers = {d: self.exits[d](h).argmax(-1) for d, h in zip(self.exits.at, inputs, strict=True)}
        return {d: float((a == best).double().mean()) if len(best) else math.nan for d, a in answers.items()}
