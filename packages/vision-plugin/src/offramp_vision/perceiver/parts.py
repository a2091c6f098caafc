"""Parts of the latent branch: latents look at a map, mix among themselves, get fewer, and the map looks at them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, scaled_dot_product_attention


class Take(nn.Module):
    """Latents [batch, count, width] look at a map [batch, width, rows, columns], pooled to `side` places.

    One attention head; a depthwise convolution of 7 x 7 before, a learned position on every key, and an MLP as wide as
    the latents after it.
    """

    def __init__(self, width: int, side: Sequence[int]) -> None:
        super().__init__()
        self.side = (side[0], side[1])
        self.near = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm_latents, self.norm_places = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.place = nn.Parameter(torch.zeros(math.prod(self.side), width))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        """Return the latents after a look at the map."""
        pooled = adaptive_avg_pool2d(image + self.near(image), self.side)
        places = self.norm_places(pooled.flatten(2).transpose(1, 2))
        query, key = self.query(self.norm_latents(latents)), self.key(places) + self.place
        latents = latents + self.out(scaled_dot_product_attention(query, key.to(query), self.value(places)))
        out: Tensor = latents + self.mlp(latents)
        return out


class Give(nn.Module):
    """Every place of a map [batch, width, rows, columns] looks at latents [batch, count, inner]; starts at zero.

    One attention head, queries, keys and values an eighth as wide as the map.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        narrow = max(1, width // 8)
        self.norm_places, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(inner)
        self.query = nn.Linear(width, narrow)
        self.key, self.value = nn.Linear(inner, narrow), nn.Linear(inner, narrow)
        self.out = nn.Linear(narrow, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        """Return what is added to the map."""
        places, latents = self.norm_places(image.flatten(2).transpose(1, 2)), self.norm_latents(latents)
        seen = scaled_dot_product_attention(self.query(places), self.key(latents), self.value(latents))
        out: Tensor = self.out(seen).transpose(1, 2)
        return out.reshape(image.shape)


class Mix(nn.Module):
    """Half as many latents, of the width of the next stage: [batch, count, width] -> [batch, count / 2, wider]."""

    def __init__(self, count: int, width: int, wider: int) -> None:
        super().__init__()
        self.fewer = nn.Sequential(nn.LayerNorm(count), nn.Linear(count, count // 2))
        self.wider = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wider))

    def forward(self, latents: Tensor) -> Tensor:
        """Mix latents channel by channel, then channels latent by latent."""
        fewer = self.fewer(latents.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.wider(fewer)
        return out


def attention(width: int, count: int, stage: int) -> nn.Sequential:
    """Return `count` transformer blocks of this width, with 1, 2, 4, 8 heads by stage where the width is divisible."""
    heads = math.gcd(width, 2**stage)
    return nn.Sequential(*(Block(width, heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(count)))
