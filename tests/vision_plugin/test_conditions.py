"""Exits under the conditions that models run in: autocast, channels last, other floats, train mode, copies."""

import copy

import pytest
import timm
import torch

import offramp


@pytest.fixture
def model():
    torch.manual_seed(0)
    block = timm.models.resnet.BasicBlock
    made = timm.models.resnet.ResNet(block, (2, 1, 1, 1), channels=(16, 16, 16, 32), num_classes=3)
    return made.eval()


@pytest.fixture
def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9).view(-1, 1, 1, 1)


def threshold(exits, images):
    """A confidence that half of the images have at the first exit, well away from any of them."""
    sure = exits[exits.at[0]](exits.observe(images).hidden[0]).softmax(-1).amax(-1).sort().values
    return sure[3:5].mean().item()


@torch.no_grad()
def test_channels_last_and_double_give_the_same(model, images):
    exits = offramp.attach(model, [1, 3], "pooled_linear")
    with offramp.enable(model, "confidence", threshold=threshold(exits, images)) as run:
        wanted = model(images)
        depths = run.stats.last_depths
        assert 0 < (depths == 1).sum() < 8
        model.to(memory_format=torch.channels_last)
        assert torch.allclose(model(images.to(memory_format=torch.channels_last)), wanted, atol=1e-4)
        model.double()
        out = model(images.double())
        assert out.dtype == torch.float64 and torch.allclose(out.float(), wanted, atol=1e-4)
        assert torch.equal(run.stats.last_depths, depths)


@torch.no_grad()
def test_autocast_keeps_the_type_of_the_model_s_own_answer(model, images):
    exits = offramp.attach(model, [1, 3], "pooled_linear")
    with torch.autocast("cpu", torch.bfloat16):
        full = model(images)
        with offramp.enable(model, "confidence", threshold=threshold(exits, images)) as run:
            mixed = model(images)
        with offramp.enable(model, "fixed", depth=1):
            early = model(images)
    assert full.dtype == mixed.dtype == early.dtype == torch.bfloat16
    assert 0 < (run.stats.last_depths == 1).sum() < 8


@torch.no_grad()
def test_copies_and_failures_leave_the_model_as_it_was(model, images):
    full = model(images)
    offramp.attach(model, [1, 3], "pooled_linear")
    run = offramp.enable(model, "fixed", depth=1)
    early = model(images)
    other = copy.deepcopy(model)
    assert torch.equal(other(images), early) and run.stats.rows == 8
    other.__dict__["_offramp_run"].disable()
    assert torch.equal(other(images), full) and torch.equal(model(images), early)
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 5, 32, 32))
    assert torch.equal(model(images), early)
    run.exits.detach()
    assert torch.equal(model(images), full) and "forward" not in model.__dict__


def test_states_that_left_are_not_kept(model, images):
    """What is remembered of an image is its answer: maps of early stages are the largest tensors of the pass."""
    offramp.attach(model, [1, 3], "pooled_linear")
    with torch.no_grad(), offramp.enable(model, "fixed", depth=3) as run:
        driver = model.forward.__self__
        kept = []
        leaving = driver.leaving
        driver.leaving = lambda hidden, gone: kept.append(leaving(hidden, gone)) or kept[-1]
        model(images)
    assert [len(k) for k in kept] == [0] and run.stats.exits == {3: 8}
