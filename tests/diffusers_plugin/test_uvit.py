"""The U-ViT of the demo: long skips, classes, and exits that leave out its deep blocks."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from offramp._plugins import adapt
from offramp.errors import BadArgument
from offramp_diffusers import demo, digits
from offramp_diffusers.policies.time_schedule import TimeSchedule
from offramp_diffusers.tune import errors, tune
from offramp_diffusers.uvit import UViT
from offramp_diffusers.ways import Trial, Way


@pytest.fixture
def model(shaken):
    torch.manual_seed(0)
    return shaken(UViT(4, 16))


@pytest.fixture
def given():
    return {"hidden_states": torch.randn(3, 1, 8, 8), "timestep": torch.tensor([9, 500, 999])}


def test_it_answers_by_class_and_its_deep_blocks_read_shallow_states(model, given):
    with torch.no_grad():
        one, two = (model(**given, class_labels=torch.tensor(c), return_dict=False)[0] for c in ([1] * 3, [2] * 3))
    assert one.shape == (3, 1, 8, 8) and not torch.allclose(one, two)
    assert [b.skip_linear is not None for b in model.blocks] == [False, False, False, True]
    assert adapt(model).facts.long_skips and adapt(model).depth == 4


def test_it_trains_and_is_measured_at_every_depth(model):
    data = {"sample": torch.zeros(16, 1, 8, 8), "class_labels": torch.arange(16) % 10}
    before = errors(model, data, DDPMScheduler(), 2, rows=8, progress=False)
    tune(model, data, DDPMScheduler(), TimeSchedule((4, 2)), steps=30, lr=3e-3, batch_size=8, progress=False)
    after = errors(model, data, DDPMScheduler(), 2, rows=8, progress=False)
    assert after[0, 3] < before[0, 3] and after[1, 1] < before[1, 1]


def test_blocks_behind_the_exit_do_not_run(model):
    images, labels = digits.load()
    judge, _ = digits.train_judge(images, labels, 1, False)
    with torch.no_grad():
        trial = Trial(judge, judge.features(images), 10, 4, DDIMScheduler)
    assert trial.run(Way("early", model, TimeSchedule((2,))), 0).saved == 0.5
    assert trial.run(Way("cached", model, None, "deep_cache", (2, 2)), 0).saved == 0.25


def test_models_that_the_demo_has(tmp_path):
    from rich.console import Console

    assert set(demo.PLANS) == set(demo.CACHES) == set(digits.MODELS)
    with pytest.raises(BadArgument, match="no model is called 'unet'; known: dit, uvit"):
        demo.run(tmp_path, True, Console(quiet=True), "unet")
