"""Small timm models with random weights, and the marks that attach and enable could leave on them."""

import pytest
import timm
import torch

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 10}


def shake(model):
    """Give every weight its own random value: fresh heads are zeros or all alike."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture
def make():
    """Build a vision transformer of 6 small blocks."""

    def build(**config):
        return shake(timm.models.vision_transformer.VisionTransformer(**{**SMALL, **config}))

    return build


@pytest.fixture
def model(make):
    return make()


@pytest.fixture
def x():
    return torch.randn(6, 3, 32, 32)


@pytest.fixture
def marks():
    def read(model):
        return {
            f"{name}.{key}": dict(value) if isinstance(value, dict) else id(value)
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
        }

    return read
