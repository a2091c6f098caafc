"""Ways to sample: what is counted is what ran, and settings of caches are as bold as quality allows."""

import pytest
import torch
from diffusers import DDIMScheduler

from offramp_diffusers import digits
from offramp_diffusers.policies.time_schedule import TimeSchedule
from offramp_diffusers.ways import SETTINGS, Trial, Way

#: settings at which a random model, whose steps are unlike, leaves out blocks
BOLD = {"first_block_cache": 10.0, "mag_cache": 10.0, "deep_cache": (2, 3)}


@pytest.fixture(scope="module")
def trial():
    images, labels = digits.load()
    judge, _ = digits.train_judge(images, labels, 2)
    with torch.no_grad():
        return Trial(judge, judge.features(images), 20, 6, DDIMScheduler)


@pytest.fixture
def model(shaken):
    return shaken(digits.make(8, 16))


@pytest.mark.parametrize("cache", SETTINGS)
def test_blocks_are_counted_by_what_ran_under_exits_and_caches(cache, trial, model):
    ran = []
    for block in model.transformer_blocks:
        block.attn1.register_forward_hook(lambda module, given, output: ran.append(len(output)))
    for policy in (None, TimeSchedule((6, 4))):
        way = Way("w", model, policy, cache, BOLD[cache], (1.0,) * trial.steps)
        ran.clear()
        found = trial.run(way, 0)
        assert found.saved == pytest.approx(1 - sum(ran) / (20 * 6 * 8)) and found.images.shape == (20, 1, 8, 8)
        assert found.saved > trial.run(Way("w", model, policy), 0).saved


def test_a_way_leaves_nothing_behind(trial, model):
    before = trial.run(Way("full", model), 0).images
    for cache in SETTINGS:
        trial.run(Way("w", model, TimeSchedule((6, 4)), cache, BOLD[cache], (1.0,) * trial.steps), 0)
    assert torch.equal(trial.run(Way("full", model), 0).images, before)


@pytest.mark.parametrize("cache", SETTINGS)
def test_the_boldest_setting_within_the_distance_is_taken(cache, trial, model):
    way = Way("w", model, None, cache)
    assert trial.fitted(way, float("inf"), 0).setting == SETTINGS[cache][-1]
    assert trial.fitted(way, 0.0, 0).setting is None


def test_a_cache_without_a_setting_runs_the_full_model(trial, model):
    assert trial.run(Way("w", model, None, "deep_cache"), 0).saved == 0


def test_growth_is_how_the_residual_of_all_blocks_changes(trial, model):
    """Of a model whose blocks add nothing but one vector it stays as it is."""
    with torch.no_grad():
        for p in model.transformer_blocks.parameters():
            p.zero_()
        model.transformer_blocks[3].ff.net[2].bias.fill_(1.0)
        for block in model.transformer_blocks:
            block.norm1.linear.bias.fill_(1.0)
    assert trial.growth(Way("full", model), 0) == pytest.approx((1.0,) * trial.steps)
