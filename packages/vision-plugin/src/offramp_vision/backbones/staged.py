"""timm models in stages, hierarchical transformers and convnets, and chains whose readout is a thing of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.backbone import Observed, Tap
from offramp.blocks import BlockSpec, Call, Chain, learn_spec, state_of, with_state
from offramp.enable import paused
from offramp.errors import UnsupportedModel
from offramp.head import HeadContext
from offramp.record import evaluating
from offramp_vision.backbones._images import ImageBackbone, near, noise, same, split
from offramp_vision.backbones._places import places
from offramp_vision.layouts import layout_of, mean_of, width_of

#: containers of stages or blocks, and stages that are numbered children, as timm names them
CONTAINERS, NUMBERED = ("stages", "layers", "blocks"), (r"layer\d+", r"s\d+", r"denseblock\d+")
SUPPORTED = (
    "blocks in `blocks` (ViT, DeiT, BEiT, EVA, CaiT), stages in `stages` or `layers` (Swin, MaxViT, ConvNeXt), "
    "`layer1` .. (ResNet), `s1` .. (RegNet), `blocks` of stages (EfficientNet, MobileNet), dense blocks (DenseNet)"
)


class StagedBackbone(ImageBackbone):
    """A timm model whose blocks may change the shape of the state; its classifier reads whatever the model gives it."""

    tail = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        readers = _classifiers(model)
        seen = _probe(model, readers)
        self.names, self.blocks, self.spec, self.shapes = seen.names, seen.blocks, seen.spec, seen.shapes
        self.layout, self.classes, self.width = seen.layout, seen.logits.shape[-1], seen.read.shape[-1]
        size = tuple(noise(model, 1).shape[-2:])
        self.places = [places(model, self.layout, shape, size) for shape in self.shapes]
        #: prefix tokens by the number of tokens: some models add a class token on the way
        self.prefixes = {s[0]: p[1] for s, p in zip(self.shapes, self.places, strict=True)}

    def taps(self) -> Sequence[Tap]:
        """Return one tap after every block, each with the width of its own state."""
        widths = [width_of(self.layout, shape) for shape in self.shapes]
        return [Tap(n, i + 1, widths[i], self.layout, *self.places[i]) for i, n in enumerate(self.names)]

    def context(self) -> HeadContext:
        """Return the model's own classifier; what comes before it is not a head's to copy."""
        return HeadContext(nn.Identity(), _reader(_classifiers(self.model)), same, self.width, self.classes)

    def chain(self) -> Chain:
        """Return the blocks, and the shapes that they make of the state."""
        return Chain(self.blocks, self.spec, shapes=self.shapes)

    def pool(self, hidden: Tensor) -> Tensor:
        """Return the mean over places: [batch, ...] -> [batch, width]."""
        return mean_of(self.layout, self.prefixes.get(hidden.shape[1], 0), hidden)

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Return the states of each image at `depths`, what the classifier read, and the labels if there are some."""
        images, labels = split(batch)
        with paused(self.model), self.chain().capture(depths) as kept:
            _, read = _read(self.model, _classifiers(self.model), images)
        return self.observed(kept, depths, read, labels, whole)


class Both(nn.Module):
    """Two classifiers as one, as distilled models average them: reads their inputs side by side."""

    def __init__(self, readers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__["readers"] = tuple(readers)  # the model's own: not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., n * width] to the mean of what n classifiers say of their part."""
        readers = self.__dict__["readers"]
        parts = hidden.chunk(len(readers), -1)
        return torch.stack([r(p) for r, p in zip(readers, parts, strict=True)]).mean(0)


def _reader(readers: Sequence[nn.Module]) -> nn.Module:
    """Return the classifier, or several as one."""
    return readers[0] if len(readers) == 1 else Both(readers)


class _Seen(NamedTuple):
    """What probes of a model saw: its chain, what the classifier read, and what the model said."""

    names: list[str]
    blocks: list[nn.Module]
    spec: BlockSpec
    shapes: list[tuple[int, ...]]
    layout: str
    read: Tensor
    logits: Tensor


def _classifiers(model: Any) -> list[nn.Module]:
    """Return the modules that give the logits; raises `UnsupportedModel` when there are none."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    found = list(found) if isinstance(found, (tuple, list)) else [found]
    if not all(isinstance(m, nn.Module) and not isinstance(m, nn.Identity) for m in found):
        raise UnsupportedModel(
            f"{type(model).__name__} is a timm model, but it has no classifier, so an exit has nothing to answer: "
            f"build it with timm.create_model(name, num_classes=...); models made with features_only=True or "
            f"num_classes=0 give features to another model, and run in full under it"
        )
    return found


def _read(model: nn.Module, readers: Sequence[nn.Module], images: Tensor) -> tuple[Any, Tensor]:
    """Run the model and return (its output, what its classifiers read, side by side)."""
    read: dict[int, Tensor] = {}
    watch = [
        m.register_forward_pre_hook(lambda _, args, i=i: read.__setitem__(i, args[0])) for i, m in enumerate(readers)
    ]
    try:
        output = model(images)
    finally:
        for handle in watch:
            handle.remove()
    return output, torch.cat([read[i] for i in range(len(readers))], -1)


def _stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the stages by name, from the containers that timm uses; empty when there are none."""
    children = dict(model.named_children())
    for name in CONTAINERS:
        if isinstance(children.get(name), (nn.Sequential, nn.ModuleList)) and len(children[name]) > 0:  # type: ignore[arg-type]
            return [(f"{name}.{k}", m) for k, m in children[name].named_children()]
    for prefix, owner in (("", model), ("features.", children.get("features", model))):
        for pattern in NUMBERED:
            found = [(prefix + k, m) for k, m in owner.named_children() if re.fullmatch(pattern, k)]
            if len(found) > 1:
                return found
    return []


def _inner(name: str, stage: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a stage; the stage itself where it has none that run one after the other."""
    held = getattr(stage, "blocks", None)
    if isinstance(held, (nn.Sequential, nn.ModuleList)) and len(held):
        return [(f"{name}.blocks.{k}", m) for k, m in held.named_children()]
    children = list(stage.named_children())
    if children and (isinstance(stage, nn.Sequential) or all(re.fullmatch(r"b\d+", k) for k, _ in children)):
        return [(f"{name}.{k}", m) for k, m in children]
    return [(name, stage)]


def _probe(model: nn.Module, readers: Sequence[nn.Module]) -> _Seen:
    """Try exits after every block, then only after every stage; raises `UnsupportedModel` when neither can be."""
    stages = _stages(model)
    kind = f"{type(model).__name__} is a timm model, but"
    if not stages:
        parts = ", ".join(k for k, _ in model.named_children())
        raise UnsupportedModel(f"{kind} no chain of blocks is found in it (its parts: {parts}); supported: {SUPPORTED}")
    inner = [_inner(*stage) for stage in stages]
    why: Exception | None = None
    for groups in (inner, [[stage] for stage in stages]):
        if sum(map(len, groups)) < 2:
            why = why or UnsupportedModel("it has fewer than 2 blocks, so there is no place for an exit")
            continue
        try:
            with evaluating(model), torch.no_grad():
                return _tried(model, readers, groups)
        except UnsupportedModel as error:
            why = why or error
        except Exception as error:  # whatever a model may raise when fewer images come out of a block than went in
            why = why or UnsupportedModel(f"calling it on images failed ({type(error).__name__}: {error})")
    raise UnsupportedModel(f"{kind} {why}; supported: {SUPPORTED}") from why


def _tried(model: nn.Module, readers: Sequence[nn.Module], groups: Sequence[Sequence[tuple[str, nn.Module]]]) -> _Seen:
    """Return what a chain of these blocks is like; raises when they are no chain, or images cannot leave between them.
    """
    names, blocks = [n for g in groups for n, _ in g], [m for g in groups for _, m in g]
    spec, _ = learn_spec(blocks, lambda batch: model(noise(model, batch)), "x", alike=False)
    if spec.batched:
        raise UnsupportedModel("its blocks take more than one tensor with the batch in it")
    images = noise(model, len(groups) + 1)
    with Chain(blocks, spec).capture(range(1, len(blocks) + 1)) as kept:
        logits, read = _read(model, readers, images)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UnsupportedModel("it does not return logits [batch, classes]")
    if not near(_reader(readers)(read), logits):
        raise UnsupportedModel("its output is not what its classifier says")
    shapes = [tuple(kept[i + 1].shape[1:]) for i in range(len(blocks))]
    layout = layout_of(shapes)
    if layout is None:
        raise UnsupportedModel(f"its blocks work on states of different kinds (shapes: {sorted(set(shapes))})")
    first = set(accumulate(map(len, groups[:-1]), initial=0))
    if not near(_leaving(model, Chain(blocks, spec), first, images), logits[:1]):
        raise UnsupportedModel("an image gets another answer when others leave between its blocks")
    return _Seen(names, blocks, spec, shapes, layout, read, logits)


def _leaving(model: nn.Module, chain: Chain, places: set[int], images: Tensor) -> Any:
    """Return what the model says of the first image when after each block of `places` the last image leaves."""

    def handler(index: int, call: Call) -> Any:
        output = call.run()
        return with_state(output, state_of(output)[:-1]) if index in places else output

    undo = chain.install(handler)
    try:
        return model(images)
    finally:
        undo()
