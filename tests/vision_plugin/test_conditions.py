"""Exits under the conditions that models run in: autocast, channels last, other floats, train mode, copies."""

import copy

import pytest
import timm
import torch

import offramp
from offramp.errors import BadArgument, DamagedFile
from offramp_vision._compat import import_timm


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
    assert [k.untyped_storage().nbytes() for k in kept] == [0] and run.stats.exits == {3: 8}


def vit(size=32, **options):
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 3}
    return timm.models.vision_transformer.VisionTransformer(img_size=size, **shape, **options).eval()


@torch.no_grad()
def test_images_of_a_wrong_size_are_refused_in_the_model_s_own_words_and_leave_nothing():
    model, x = vit(), torch.randn(4, 3, 32, 32)
    with offramp.attach(model, [1, 2], "pooled_linear"), offramp.enable(model, "fixed", depth=1) as run:
        wanted = model(x)
        with pytest.raises(AssertionError, match="Input height .48. doesn't match model .32."):
            model(torch.randn(4, 3, 48, 48))
        assert run.stats.rows == 4 and torch.equal(model(x), wanted)


@torch.no_grad()
def test_exits_of_another_resolution_are_refused(tmp_path):
    with offramp.attach(vit(), [1, 2], "local_perception") as exits:
        exits.save(tmp_path)
    larger = vit(64)
    with pytest.raises(DamagedFile, match=r"exits for image \[32, 32\], this model has \[64, 64\]; attach and fit"):
        offramp.load(larger, tmp_path)
    assert not hasattr(larger, "exits")
    supple = vit(dynamic_img_size=True)
    offramp.load(supple, tmp_path)
    with offramp.enable(supple, "fixed", depth=1) as run:
        with pytest.raises(BadArgument, match="built for 4 x 4 places, and these images have 64: give images of the"):
            supple(torch.randn(2, 3, 64, 64))
        supple(torch.randn(2, 3, 32, 32))
    assert run.stats.rows == 2


def test_exits_for_other_classes_are_refused(model, tmp_path):
    with offramp.attach(model, [1, 3], "pooled_linear") as exits:
        exits.save(tmp_path)
    model.reset_classifier(7)
    with pytest.raises(DamagedFile, match="exits for classes 3, this model has 7; attach and fit new exits"):
        offramp.load(model, tmp_path)
    assert not hasattr(model, "exits")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "pip install --force-reinstall torch torchvision"),
        (ModuleNotFoundError("No module named 'torchvision'"), "pip install --force-reinstall torch torchvision"),
        (ModuleNotFoundError("No module named 'timm'"), "pip install 'timm>=1.0'"),
    ],
)
def test_libraries_that_do_not_load_say_what_to_run(error, said, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(BadArgument) as caught:
        import_timm()
    assert said in str(caught.value) and str(error) in str(caught.value)


@torch.no_grad()
def test_compiled_blocks_stay_compiled(caplog):
    """What the compiler made of a block runs inside the hook, on as many images as are left."""
    caplog.set_level("CRITICAL")  # the compiler says a thousand things
    model, x, ran = vit(), torch.randn(6, 3, 32, 32), []

    def backend(graph, inputs):
        def run(*args):
            ran.append(max(len(a) for a in args if isinstance(a, torch.Tensor) and a.dim() == 3))
            return graph(*args)

        return run

    full = model(x)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend=backend)
    exits = offramp.attach(model, [1, 2], "pooled_linear")
    middle = threshold(exits, x)
    said = exits[1](exits.observe(x).hidden[0])
    ran.clear()
    with offramp.enable(model, "confidence", threshold=middle) as run:
        out = model(x)
    assert 0 < run.stats.exits[1] < 6 and sum(ran) == run.stats.blocks_run
    early = run.stats.last_depths == 1
    assert torch.allclose(out[early], said[early], atol=1e-5)
    exits.detach()
    assert torch.allclose(model(x), full, atol=1e-5)


@torch.no_grad()
def test_models_with_blocks_compiled_in_place_answer_the_same(caplog):
    """`block.compile()` goes through the hook as well: it may gain nothing, and must change nothing."""
    caplog.set_level("CRITICAL")
    model, x = vit(), torch.randn(6, 3, 32, 32)
    exits = offramp.attach(model, [1, 2], "pooled_linear")
    middle = threshold(exits, x)
    with offramp.enable(model, "confidence", threshold=middle) as run:
        wanted, depths = model(x), run.stats.last_depths
        for block in model.blocks:
            block.compile(backend="eager")
        assert torch.allclose(model(x), wanted, atol=1e-5) and torch.equal(run.stats.last_depths, depths)
