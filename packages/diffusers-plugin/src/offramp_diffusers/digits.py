"""A real data set that needs no download, a denoiser for it, and how good its samples are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from offramp.errors import BadArgument
from offramp.record import evaluating

CLASSES, SIDE = 10, 8
#: levels of grey in the data set
WHITE = 16.0
#: images that are denoised at once, at most: twice as many take 2.5 times as long on these machines
BATCH = 250
#: numbers that the classifier says about an image before it names a class: what the Frechet distance is over
FEATURES = 32


def load() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits: images [1797, 1, 8, 8] from -1 to 1, and labels [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadArgument("the digits come with scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / WHITE * 2 - 1
    return images, torch.tensor(found.target, dtype=torch.long)


def make(depth: int = 8, width: int = 48) -> nn.Module:
    """Return a fresh DiT for 8 x 8 images of 10 classes: 16 tokens, `depth` blocks."""
    from diffusers import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel(
        num_attention_heads=width // 16, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=depth,
        sample_size=SIDE, patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)  # adaLN-zero: every block starts as the identity
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    return model  # type: ignore[no-any-return]


def make_uvit() -> nn.Module:
    """Return a fresh U-ViT of 12 blocks: the deep ones also read the states of shallow ones. Of 8, a stop leaves out so
    large a share that 600 steps of tuning leave it 30 % from the full model."""
    from offramp_diffusers.uvit import UViT

    return UViT(12)


#: denoisers that can be shown, by name
MODELS: dict[str, Callable[[], nn.Module]] = {"dit": make, "uvit": make_uvit}


class Judge(nn.Module):
    """A small classifier of digits [rows, 1, 8, 8]; its features [rows, 32] are what samples are compared in."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.GELU(),
            nn.Flatten(), nn.Linear(32 * 16, FEATURES), nn.Tanh(),
        )  # fmt: skip
        self.classes = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [rows, 10]."""
        out: Tensor = self.classes(self.features(images))
        return out


def train_judge(images: Tensor, labels: Tensor, steps: int = 600) -> tuple[Judge, float]:
    """Return a classifier trained on four fifths of the digits, and its accuracy on the rest."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = rest[torch.randint(len(rest), (128,), generator=generator)]
        loss = nn.functional.cross_entropy(judge(images[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    judge.eval()
    with torch.no_grad():
        accuracy = float((judge(images[held]).argmax(-1) == labels[held]).float().mean())
    return judge, accuracy


def frechet(one: Tensor, two: Tensor) -> float:
    """Return the Frechet distance between two sets of features [rows, features], as if both were Gaussian."""
    a, b = one.double().numpy(), two.double().numpy()
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    spread = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * np.real(root))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)


@torch.no_grad()
def steps(model: Any, scheduler: Any, count: int, wanted: Tensor, seed: int) -> Iterator[Tensor]:
    """Denoise an image of each class in `wanted` [rows] in `count` steps; yields the images [rows, 1, 8, 8] after each.

    The same seed gives every way of running the same noise.
    """
    rows = len(wanted)
    x = torch.randn(rows, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(count)
    x = x * scheduler.init_noise_sigma
    with evaluating(model):  # in training, a DiT forgets one class in ten
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t)
            said = model(given, timestep=t.expand(rows), class_labels=wanted, return_dict=False)[0][:, :1]
            x = scheduler.step(said, t, x).prev_sample
            yield x


def classes(rows: int) -> Tensor:
    """Return the classes 0 to 9 in turn [rows]."""
    return torch.arange(rows) % CLASSES


@torch.no_grad()
def quality(judge: Judge, made: Tensor, wanted: Tensor, real: Tensor) -> tuple[float, float]:
    """Return (Frechet distance to the features of real images [images, 32], share of the images made [rows, 1, 8, 8]
    that the classifier takes for the class that was asked for)."""
    features = judge.features(made)
    said = judge.classes(features).argmax(-1) == wanted
    return frechet(features, real), float(said.float().mean())
