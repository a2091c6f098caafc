"""The toy model, claimed by its own plugin, for every test of the core."""

import pytest
import torch

from offramp.testing.toy import ToyModel, toy_plugin


@pytest.fixture(autouse=True)
def toy():
    with toy_plugin():
        yield


@pytest.fixture
def model():
    return ToyModel().eval()


@pytest.fixture
def x():
    return torch.randn(7, 3, 8)


@pytest.fixture
def marks():
    """Everything that attach and enable could leave on a model."""

    def read(model):
        return {
            f"{name}.{key}": dict(value) if isinstance(value, dict) else id(value)
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
        }

    return read
