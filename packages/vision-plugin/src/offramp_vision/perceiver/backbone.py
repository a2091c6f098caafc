"""A model in stages with a latent branch beside it: what its exits read, and how images leave both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.attach import Exits
from offramp.backbone import Observed, Undo
from offramp.blocks import BlockSpec, Call, Chain
from offramp.enable import Run, paused
from offramp.errors import BadArgument, UnsupportedModel
from offramp.head import HeadContext
from offramp.options import refuse_generation
from offramp.record import evaluating
from offramp_vision.backbones._images import noise, same, split
from offramp_vision.backbones._pass import ImagePass
from offramp_vision.backbones.staged import StagedBackbone
from offramp_vision.heads.perceiver import Perceiver
from offramp_vision.layouts import map_of
from offramp_vision.perceiver.branch import Branch
from offramp_vision.perceiver.stages import ends_of

#: where the branch lives among the heads
BRANCH = "branch"


def beside(exits: Exits) -> Callable[[], None]:
    """Build the branch of freshly attached exits and hook it beside the model; returns the undo.

    Raises `UnsupportedModel` for a model without stages, `BadArgument` for options that do not fit it.
    """
    plain: Any = exits.backbone
    ends = ends_of(plain)
    readers = plain.context().projection
    if not isinstance(plain, StagedBackbone) or readers is not plain.model.get_classifier():  # type: ignore[operator]
        raise UnsupportedModel(
            f"{type(plain.model).__name__} is no model in stages with one classifier, so no latent branch goes beside "
            f"it; attach other heads, e.g. head='pooled_linear'"
        )
    taps = plain.taps()
    with evaluating(plain.model), torch.no_grad(), plain.chain().capture([0]) as kept:
        images = noise(plain.model, 1)
        plain.model(images)
    first = map_of(plain.layout, 0, (), kept[0]).shape
    widths = [first[1], *(taps[end - 1].width for end in ends)]
    grids = [first[2:], *(taps[end - 1].grid for end in ends)]
    options = _options(exits, ends)
    heads: Mapping[int, Any] = {depth: exits[depth] for depth in exits.at}
    branch = Branch(widths, grids, ends, heads, plain.layout, plain.classes, **options)
    exits.modules[BRANCH] = branch.to(images).train(plain.model.training)
    exits.backbone = PerceiverBackbone(plain, branch)
    return Undos([plain.chain().install(branch.block), Chain([readers], BlockSpec("x")).install(branch.answer)])


@dataclass
class Undos:
    """Undoes several things, last one first; an object and no closure, so that a deep copy undoes its own."""

    mine: list[Undo]

    def __call__(self) -> None:
        """Undo them, once."""
        while self.mine:
            self.mine.pop()()


def _options(exits: Exits, ends: Sequence[int]) -> dict[str, Any]:
    """Return the options of the branch, checked; raises `BadArgument` saying what fits."""
    known = inspect.signature(Perceiver.build).parameters
    latents, depths, places = (exits.config.get(n, known[n].default) for n in ("latents", "depths", "places"))
    if odd := [depth for depth in exits.at if depth not in ends[:-1]]:
        raise BadArgument(
            f"perceiver: no stage ends at {odd}, and exits of a latent branch are at the ends of stages, here "
            f"{list(ends[:-1])}; write offramp_vision.perceiver.attach(model), or at={list(ends[:-1][-2:])}"
        )
    step = 2 ** (len(ends) - 1)
    if isinstance(latents, bool) or not isinstance(latents, int) or latents < step or latents % step:
        raise BadArgument(
            f"perceiver: latents={latents!r} must be a number that {len(ends)} stages can halve: divisible by {step}"
        )
    if isinstance(places, bool) or not isinstance(places, int) or places < 1:
        raise BadArgument(f"perceiver: places={places!r} must be the side of a grid, from 1 on")
    counts = list(depths) if isinstance(depths, (list, tuple)) else []
    counts = counts[-len(ends) :] if "depths" not in exits.config else counts
    if len(counts) != len(ends) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise BadArgument(f"perceiver: depths={depths!r} must be a number of blocks for each of {len(ends)} stages")
    return {"latents": latents, "depths": counts, "places": places}


class Merged(nn.Module):
    """The model's own classifier and that of the latents, added: one linear layer over both side by side."""

    def __init__(self, own: nn.Module, width: int, branch: Branch) -> None:
        super().__init__()
        self.__dict__["parts"] = own, width, branch  # the model's own: not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """Map what both read, side by side, to logits."""
        own, width, branch = self.__dict__["parts"]
        branch.flow = None  # whatever forward was left half-way: its latents are not these
        out: Tensor = own(hidden[..., :width]) + branch.merge(hidden[..., width:])
        return out


class PerceiverBackbone(StagedBackbone):
    """The blocks of the model in stages, with latents beside them; readouts read latents."""

    def __init__(self, plain: StagedBackbone, branch: Branch) -> None:
        vars(self).update(vars(plain))  # found once: with the branch in place another probe would see its hooks
        self.plain, self.branch = plain, branch

    def context(self) -> HeadContext:
        """Return the model's own classifier, with that of the latents."""
        own = self.plain.context()
        merge = self.branch.merge
        width = self.width + merge.width + (0 if merge.hear is None else self.classes)
        return HeadContext(nn.Identity(), Merged(own.projection, self.width, self.branch), same, width, self.classes)

    def fingerprint(self) -> dict[str, Any]:
        """Return what an exits directory must agree with, which is about the model without the branch."""
        return self.plain.fingerprint()

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Return what exits at `depths` and the last readout read of each image, and the labels if there are some."""
        images, labels = split(batch)
        kept: dict[int, Any] = {}
        last: list[Tensor] = []

        def block(index: int, call: Call) -> Any:
            output = call.run()
            if index + 1 in depths:
                kept[index + 1] = self.branch.now().read
            return output

        def read(index: int, call: Call) -> Any:
            last.append(torch.cat([call.hidden, self.branch.evidence()], -1))
            return call.run()

        own = self.plain.context().projection
        undo = Undos([self.chain().install(block), Chain([own], BlockSpec("x")).install(read)])
        try:
            with paused(self.model):
                self.model(images)
        finally:
            undo()
        targets = None if labels is None else labels.to(last[0].device)
        seen = [kept[d] for d in depths]
        return Observed(seen, last[0], targets, sample=torch.arange(len(last[0])), whole=seen if whole else [])

    def window(self, start: int, stop: int, hidden: Tensor | None = None) -> AbstractContextManager[Any]:
        """Raise `BadArgument`: a state alone does not say where the latents are."""
        raise BadArgument("a model with a latent branch has no windows: a state alone does not say what latents saw")

    def drive(self, run: Run) -> Undo:
        """Let images leave both inside one forward; raises `BadArgument` for options of generation."""
        refuse_generation(run.options, f"{type(self.model).__name__} answers once per image")
        return PerceiverPass(run).install()


class PerceiverPass(ImagePass):
    """One forward in which images leave the model and their latents the branch."""

    def forget(self) -> None:
        """Drop everything that belongs to one forward, its latents too."""
        super().forget()
        self.run.backbone.branch.flow = None  # type: ignore[attr-defined]

    def pool(self, hidden: Tensor) -> Tensor:
        """Return what the exit reads of the latents."""
        flow = self.run.backbone.branch.flow  # type: ignore[attr-defined]
        read: Tensor = flow.read
        return read

    def leave(self, depth: int, hidden: Tensor, stop: Tensor, gone: Tensor, answer: Tensor | None) -> Tensor:
        """Take rows out of both; returns the indices of those that go on."""
        kept = super().leave(depth, hidden, stop, gone, answer)
        self.run.backbone.branch.flow.cut(kept)  # type: ignore[attr-defined]
        return kept
