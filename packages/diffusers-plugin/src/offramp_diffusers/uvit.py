"""A small U-ViT for the digits: a transformer whose deep blocks also read the states of shallow ones."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from offramp_diffusers.digits import CLASSES, SIDE

#: pixels per side of a patch, numbers per attention head, and tokens that a class is told as
PATCH, HEAD, TOLD = 2, 16, 1


class UViT(HunyuanDiT2DModel):
    """HunyuanDiT, which is diffusers' transformer with long skips and a noise level, told a class instead of a text.

    Its GELU is the exact one: the approximate one takes four times as long on a CPU, and a sixth of a training step.
    """

    def __init__(self, depth: int = 8, width: int = 48) -> None:
        super().__init__(
            num_attention_heads=width // HEAD, attention_head_dim=HEAD, in_channels=1, patch_size=PATCH,
            sample_size=SIDE, hidden_size=width, num_layers=depth, learn_sigma=False, cross_attention_dim=width,
            cross_attention_dim_t5=width, pooled_projection_dim=width, text_len=TOLD, text_len_t5=TOLD,
            use_style_cond_and_image_meta_size=False, activation_fn="gelu",
        )  # fmt: skip
        self.table = nn.Embedding(CLASSES, width)
        for block in self.blocks:  # normalising queries and keys is a tenth of the time, and samples are worse for it
            for attention in (block.attn1, block.attn2):
                attention.norm_q = attention.norm_k = None
        side = SIDE // PATCH
        cos, sin = get_2d_rotary_pos_embed(HEAD, ((0, 0), (side, side)), (side, side))
        self.register_buffer("cos", torch.as_tensor(cos, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.as_tensor(sin, dtype=torch.float32), persistent=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        """Return the predicted noise [rows, 1, 8, 8] of images at noise levels and classes [rows]."""
        told = self.table(class_labels)[:, None]
        on = torch.ones(len(told), TOLD, device=told.device)
        return super().forward(
            hidden_states, timestep.to(told), told, on, told, on, image_rotary_emb=(self.cos, self.sin),
            return_dict=return_dict,
        )  # fmt: skip
