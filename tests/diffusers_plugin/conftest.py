"""A small denoiser with random weights, one batch for it, and the marks that attach and enable could leave on it."""

import pytest
import torch
from diffusers import DiTTransformer2DModel


def shake(model):
    """Give every weight its own random value: a fresh denoiser's blocks start as the identity."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture
def make():
    """Build a DiT of 6 small blocks."""

    def build(**config):
        small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "num_embeds_ada_norm": 1000}
        latents = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2}
        return shake(DiTTransformer2DModel(**{**small, **latents, **config}))

    return build


@pytest.fixture
def dit(make):
    return make()


@pytest.fixture
def batch():
    return {
        "hidden_states": torch.randn(4, 4, 8, 8),
        "timestep": torch.tensor([999, 500, 250, 1]),
        "class_labels": torch.tensor([1, 2, 3, 1000]),
    }


@pytest.fixture
def marks():
    def read(model):
        return {
            f"{name}.{key}": dict(value) if isinstance(value, dict) else id(value)
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
        }

    return read
