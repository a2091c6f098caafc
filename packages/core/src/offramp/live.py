"""Rows for training with the model running in every step: with it, or for heads that read whole sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
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

#: states of frozen batches are kept in memory up to this many bytes
CACHE_BYTES = 4 << 30


class Live:
    """Observations batch by batch, endlessly; a tensor or mapping of tensors is shuffled anew each time round.

    data: as for `fit`; `agreement` is measured on its first batch, frozen on the last tenth of the rows of a tensor or
    mapping, which is then held out. layer_dropout: rate of the
    last block; block l of L has rate * (2^(l / (L - 1)) - 1), drawn per sample (arXiv 2404.16710).
    schedule: at each place only the blocks that it gives to that generated token change the state (arXiv 2307.02628).
    Keys and values of places that skip a block stay in it, but only later places look at them, and those skip it too.
    frozen: only the heads are trained; the model runs in eval mode, and, unless what they read is trained with them,
    once per batch, of which what fits into CACHE_BYTES is kept. taps: further depths whose states are wanted, in
    `Observed.states` with those of all depths. equilibrium: take the part of gradient equilibrium that lies between
    blocks. deepest: keep the whole state after the last block too.
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
        equilibrium: bool = False,
        deepest: bool = False,
    ) -> None:
        self.exits, self.data, self.batch_size, self.schedule = exits, data, batch_size, schedule
        self.frozen, self.taps, self.deepest = frozen, taps, deepest
        #: whether states are the same in every step, and kept
        self.still = frozen and not exits.live
        #: by which factor gradients of the state after a block go on downwards: n / (n + 1) under n exits
        self.share: dict[int, float] = {}
        if equilibrium:
            self.share = {k - 1: 1 - 1 / (len(exits.at) - i + 1) for i, k in enumerate(exits.at)}
        #: which blocks run at each place of the batch [batch, token, depth]
        self.runs: Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)
        depth = exits.backbone.depth
        self.rates = [layer_dropout * (2 ** (i / max(1, depth - 1)) - 1) for i in range(depth)]
        rows = _rows(data)
        if frozen and rows is not None and rows >= 10:
            cut = rows - rows // 10
            self.data = _pick(data, torch.arange(cut))
            self.held = list(batches(_pick(data, torch.arange(cut, rows)), batch_size))
        else:
            self.held = list(islice(batches(data, batch_size), 1))
        if not self.held:
            raise BadArgument("the data holds no rows; give at least one batch")

    def __iter__(self) -> Iterator[Observed]:
        kept: list[Observed] | None = [] if self.still else None
        seen, before, size = 0, -1, 0
        while seen > before:  # an iterator that is used up yields nothing the second time
            before = seen
            for batch in batches(self._shuffled(), self.batch_size):
                one = self.observe(batch)
                if kept is not None:
                    kept.append(one)
                    size += sum(h.numel() * h.element_size() for h in one.kept())
                    kept = kept if size <= CACHE_BYTES else None
                yield one
                seen += 1
            while kept:
                for i in torch.randperm(len(kept), generator=self.generator).tolist():
                    yield kept[i]
        raise BadArgument(f"the data ended after {seen} batches; give an iterable that can be gone through again")

    def _shuffled(self) -> Any:
        rows = _rows(self.data)
        return self.data if rows is None else _pick(self.data, torch.randperm(rows, generator=self.generator))

    def observe(self, batch: Any) -> Observed:
        """Run the model on one batch; not frozen, in train mode, with layer dropout and schedule."""
        exits, model, backbone = self.exits, self.exits.model, self.exits.backbone
        if self.still:
            with torch.no_grad():
                return exits.observe(batch, deepest=self.deepest)
        if self.schedule is not None:
            self.runs = runs(self.schedule, backbone.generated(batch), backbone.depth)
        acts = any(self.rates) or self.schedule is not None or self.share
        undo = backbone.chain().install(self._block) if acts else None
        (exits.modules if self.frozen else model).train()
        try:
            return exits.observe(batch, self.taps, self.deepest)
        finally:
            model.eval()
            if undo is not None:
                undo()

    def _block(self, index: int, call: Call) -> Any:
        output, rate = call.run(), self.rates[index]
        state = kept = state_of(output)
        if rate and state.shape == call.hidden.shape:  # a block that changes the shape cannot be left out
            shape = (state.shape[0], *[1] * (state.dim() - 1))
            keep = torch.rand(shape, generator=self.generator).to(state.device) >= rate
            kept = torch.where(keep, state, call.hidden)
        if self.runs is not None:
            kept = torch.where(self.runs[..., index, None], kept, call.hidden)
        if index in self.share:
            kept = share_gradient(kept, self.share[index])
        return output if kept is state else with_state(output, kept)

    @torch.no_grad()
    def agreement(self) -> dict[int, float]:
        """Return on which share of the rows kept for it each exit says what the full model says."""
        exits = self.exits
        hits, rows = dict.fromkeys(exits.at, 0.0), 0
        with evaluating(exits.model):
            for batch in self.held:
                seen = exits.observe(batch)
                final = exits.backbone.context().readout(seen.final)
                rows += len(final)
                for depth, hidden in zip(exits.at, exits.inputs(seen), strict=True):
                    hits[depth] += same(exits[depth](hidden), final)
        return {d: n / rows if rows else math.nan for d, n in hits.items()}


def same(prediction: Tensor, final: Tensor) -> float:
    """Return on how many rows a prediction [rows, classes] says what the full model says; NaN for a single number,
    which has no classes to be the same."""
    return math.nan if final.shape[-1] == 1 else int((prediction.argmax(-1) == final.argmax(-1)).sum())


def share_gradient(hidden: Tensor, factor: float) -> Tensor:
    """Return the same values, through which gradients come back times `factor`."""
    if not hidden.requires_grad:
        return hidden
    out = hidden.view_as(hidden)
    out.register_hook(lambda gradient: gradient * factor)
    return out


def _rows(data: Any) -> int | None:
    """Return how many rows a tensor or a mapping of tensors has, None for anything else."""
    tensors = data.values() if isinstance(data, Mapping) else [data]
    return next((len(t) for t in tensors if isinstance(t, Tensor)), None)


def _pick(data: Any, index: Tensor) -> Any:
    """Return rows of a tensor or of every tensor of a mapping."""
    if isinstance(data, Tensor):
        return data[index]
    return {k: v[index] if isinstance(v, Tensor) else v for k, v in data.items()}
