"""What the demo and the benchmark of heads start from: small classifiers of timm, and digits in three parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp_vision import digits

Part = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A small classifier and how it is trained. at, head, config: of its exits; steps, lr: of model and exits together.
    """

    name: str
    told: str
    build: Callable[[], nn.Module]
    at: tuple[int, ...]
    steps: int
    lr: float
    head: str
    config: dict[str, Any] = field(default_factory=dict)

    def fitting(self) -> dict[str, Any]:
        """Return what the fitted weights depend on."""
        return {k: v for k, v in vars(self).items() if k not in ("told", "build")}


@dataclass(frozen=True)
class Plan:
    """How much of everything. train, calibrate, test: images, disjoint; reach: pixels by which training
    images are moved; share: of training steps; rounds: over the test images on the clock; seed: of split, weights and
    training, by default not one of those (0, 1) on which these settings were chosen.
    """

    train: int = 1100
    calibrate: int = 600
    test: int = 577
    batch: int = 64
    reach: int = 1
    share: float = 1.0
    rounds: int = 4
    risk: str = "accuracy_drop"
    alpha: float = 0.01
    delta: float = 0.05
    seed: int = 2

    def fitting(self) -> dict[str, Any]:
        """Return what the fitted weights depend on; a change of anything else reuses them."""
        return {k: getattr(self, k) for k in ("train", "test", "batch", "reach", "share", "seed")}


QUICK = Plan(train=128, calibrate=256, test=128, share=0.02, rounds=1, alpha=0.2)


def vit() -> nn.Module:
    """Return a vision transformer of 8 blocks, width 96, whose 16 patches come out of three convolutions.

    A thousand images are few for patches cut out plainly: with those it is right on some 90 % (Xiao et al., NeurIPS
    2021, arXiv 2106.14881, on why).
    """
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed

    def stem(**given: Any) -> nn.Module:
        halving = ConvStem(in_chans=1, channels=(24, 48, 96), kernel_size=3, stride=(2, 2, 2), padding=1)
        return HybridEmbed(backbone=halving, proj=False, **given)  # type: ignore[no-any-return]

    return VisionTransformer(  # type: ignore[no-any-return]
        img_size=digits.SIDE, patch_size=1, in_chans=1, num_classes=digits.CLASSES, embed_dim=96, depth=8, num_heads=4,
        embed_layer=stem,
    )  # fmt: skip


def cnn() -> nn.Module:
    """Return a residual network of 13 blocks in 4 stages, 32 to 192 channels, with a light stem.

    Most blocks are in the second stage, on maps of 4 x 4: on single places a block reads its weights, whoever is left,
    so that where most are in the last two stages next to nothing is saved.
    """
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(  # type: ignore[no-any-return]
        BasicBlock, (2, 8, 2, 1), in_chans=1, num_classes=digits.CLASSES, channels=(32, 96, 128, 192), stem_type="deep",
        stem_width=8,
    )  # fmt: skip


SHAPES = (
    Shape("ViT", "vision transformer, 8 blocks of width 96", vit, (1, 3), 400, 1e-3, "lgvit", {"heads": 4}),
    Shape("CNN", "ResNet, 13 blocks of 32 to 192 channels", cnn, (3, 6), 180, 2e-3, "local_perception"),
)


def fresh(shape: Shape, seed: int) -> Any:
    """Return the classifier with new weights, in eval mode; the global random state is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shape.build().eval()


def parts(found: digits.Digits, how: Plan) -> list[Part]:
    """Return the images in three disjoint parts: to train on, to calibrate on, to test on (fewer where fonts are few).
    """
    cuts = (0, how.train, how.train + how.calibrate, how.train + how.calibrate + how.test)
    return [{"x": found.images[a:b], "labels": found.labels[a:b]} for a, b in zip(cuts, cuts[1:], strict=False)]


def batches(part: Part, size: int) -> list[Part]:
    """Return the images in batches, in order."""
    return [{k: v[i : i + size] for k, v in part.items()} for i in range(0, len(part["labels"]), size)]


class Moved:
    """Training batches in another order each time round, each image moved by up to `reach` pixels both ways."""

    def __init__(self, part: Part, how: Plan) -> None:
        self.part, self.size, self.reach = part, how.batch, how.reach
        self.generator = torch.Generator().manual_seed(how.seed)

    def __iter__(self) -> Iterator[Part]:
        images, labels = self.part["x"], self.part["labels"]
        for rows in torch.randperm(len(labels), generator=self.generator).split(self.size):
            by = torch.randint(-self.reach, self.reach + 1, (len(rows), 2), generator=self.generator).tolist()
            moved = [images[i].roll(tuple(step), (1, 2)) for i, step in zip(rows.tolist(), by, strict=True)]
            yield {"x": torch.stack(moved), "labels": labels[rows]}
