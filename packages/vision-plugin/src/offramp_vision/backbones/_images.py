"""What all backbones of images share: batches, the flag, driving, and pictures of noise to try a model on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone, Observed, Undo
from offramp.enable import Run, paused
from offramp.errors import BadArgument
from offramp.options import refuse_generation
from offramp_vision.backbones._pass import ImagePass

IMAGES, LABELS = ("pixel_values", "x"), ("labels", "y")


class ImageBackbone(Backbone):
    """A timm classifier as a chain of blocks; what differs is where its blocks are and what its classifier reads."""

    model: nn.Module

    def call(self, batch: Any) -> Any:
        """Run the model on a tensor of images, or on those of (images, labels) or of a mapping."""
        return self.model(split(batch)[0])

    def batched(self, data: Any, batch_size: int, seed: int | None = None) -> Any:
        """Return batches of a data set of (image, label) or of rows with an image, preprocessed for this model."""
        from offramp_vision.data import is_rows, loader, splits_of  # it imports this module

        if splits := splits_of(data):
            raise BadArgument(f"the data comes in parts ({', '.join(splits)}); give one, e.g. data[{splits[0]!r}]")
        return loader(data, self.model, self.context().classes, batch_size, seed) if is_rows(data) else data

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Return the pooled states of each image at `depths` and at the end, and the labels if the batch has some."""
        images, labels = split(batch)
        with paused(self.model), self.chain().capture([*depths, self.depth]) as kept:
            self.model(images)
        final = self.pool(kept[self.depth])
        return self.observed(kept, depths, final, labels, whole)

    def observed(
        self, kept: Mapping[int, Tensor], depths: Sequence[int], final: Tensor, labels: Tensor | None, whole: bool
    ) -> Observed:
        """Return what `observe` does, of states kept by depth and what the readout took."""
        targets = None if labels is None else labels.to(final.device)
        seen = Observed([self.pool(kept[d]) for d in depths], final, targets, sample=torch.arange(len(final)))
        seen.whole = [kept[d] for d in depths] if whole else []
        return seen

    def drive(self, run: Run) -> Undo:
        """Let images leave inside one forward; raises `BadArgument` for options of generation."""
        refuse_generation(run.options, f"{type(self.model).__name__} answers once per image")
        return ImagePass(run).install()

    def fingerprint(self) -> dict[str, Any]:
        """Return what an exits directory must agree with: also the size of images, where the model is built for one."""
        size = size_of(self.model)
        return {**super().fingerprint(), **({} if size is None else {"image": size})}

    def flag(self) -> Mapping[str, Any] | None:
        """Return the dict under `early_exit` in the model's `pretrained_cfg`, or None."""
        config = getattr(self.model, "pretrained_cfg", None)
        found = config.get("early_exit") if isinstance(config, Mapping) else None
        return found if isinstance(found, Mapping) else None


def same(logits: Tensor) -> Tensor:
    """Return logits as they are: a classifier of timm does nothing to them."""
    return logits


def split(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return images and labels (or None) of a batch; raises `BadArgument` naming what can be given."""
    if isinstance(batch, Mapping):
        images = next((batch[k] for k in IMAGES if k in batch), None)
        labels = next((batch[k] for k in LABELS if k in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        images, labels = batch
    else:
        images, labels = batch, None
    if not isinstance(images, Tensor) or images.dim() != 4 or not (labels is None or isinstance(labels, Tensor)):
        raise BadArgument(
            "a batch of images is a tensor [batch, channel, height, width], a pair (images, labels), or a mapping "
            f"with {' or '.join(map(repr, IMAGES))} and, for labels, {' or '.join(map(repr, LABELS))}; "
            f"got {describe(batch)}"
        )
    if not images.is_floating_point():
        raise BadArgument(
            f"images of {images.dtype} are not normalised: models take floats; write "
            "(images / 255 - mean) / std, with mean and std of timm.data.resolve_model_data_config(model)"
        )
    return images, labels


def describe(batch: Any) -> str:
    """Return what was given, in a few words."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, batch)) or 'nothing'}"
    return f"a {type(batch).__name__}"


def size_of(model: nn.Module) -> list[int] | None:
    """Return the size [height, width] of images that the model is built for, None where it takes any."""
    given = next((g for m in model.modules() if (g := getattr(m, "img_size", None)) is not None), None)
    return [given, given] if isinstance(given, int) else given if given is None else list(given)


def noise(model: nn.Module, batch: int) -> Tensor:
    """Return images of the size that the model takes, the same each time; the global random state is not touched."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size", (3, 224, 224))
    size = size_of(model) or size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    like = next(p for p in model.parameters() if p.is_floating_point())
    shape = (batch, channels if first is None else first.in_channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def near(found: Any, wanted: Tensor) -> bool:
    """Return whether two ways of computing one thing give the same up to rounding."""
    loose = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 3e-2
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool(((found - wanted).abs().amax() <= loose * (wanted.abs().amax() + loose)).item())
