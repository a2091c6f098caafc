"""The U-ViT of the demo: long skips, classes, and exits that leave out its deep blocks."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.attention_processor import HunyuanAttnProcessor2_0

import offramp
from offramp._plugins import adapt
from offramp.errors import BadArgument
from offramp_diffusers import demo, digits
from offramp_diffusers.deep_cache import deep_cache
from offramp_diffusers.noising import noised, predict
from offramp_diffusers.policies.time_schedule import TimeSchedule
from offramp_diffusers.tune import errors, stops, tune
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


class Theirs(HunyuanAttnProcessor2_0):
    """diffusers' own attention, which takes cosines and sines of each number instead of complex ones of pairs."""

    def __call__(self, *args, image_rotary_emb, **kwargs):
        parts = (part.repeat_interleave(2, 1) for part in (image_rotary_emb.real, image_rotary_emb.imag))
        return super().__call__(*args, image_rotary_emb=tuple(parts), **kwargs)


def test_its_attention_is_that_of_diffusers(model, given):
    labels = torch.tensor([1, 2, 3])
    ours = model(**given, class_labels=labels).sample
    model.set_attn_processor(Theirs())
    theirs = model(**given, class_labels=labels).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_it_trains_and_is_measured_at_the_depths_that_keep_its_skips(model):
    data = {"sample": torch.zeros(16, 1, 8, 8), "class_labels": torch.arange(16) % 10}
    assert stops(model) == {1: 2, 4: 4}
    before = errors(model, data, DDPMScheduler(), 2, rows=8, progress=False)
    tune(model, data, DDPMScheduler(), TimeSchedule((4, 1)), steps=30, lr=3e-3, batch_size=8, progress=False)
    after = errors(model, data, DDPMScheduler(), 2, rows=8, progress=False)
    assert before.shape == (2, 2) and after[0, 1] < before[0, 1] and after[1, 0] < before[1, 0]


def test_errors_are_those_of_the_blocks_that_run(model):
    """Depth 1 of 4 is blocks 1 and 4; measured beside the truncated depth 2."""
    data, scheduler = {"sample": torch.randn(4, 1, 8, 8), "class_labels": torch.arange(4)}, DDPMScheduler()
    found = errors(model, data, scheduler, 1, depths=(1, 2), rows=16, progress=False)
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(4, (16,), generator=generator)
    given, wanted, _ = noised(data, picked, scheduler, (0.0, 1000.0), generator, model)
    for column, depth in enumerate((1, 2)):
        with torch.no_grad(), offramp.enable(model, TimeSchedule((depth,))) as run:
            said = predict(model, given, wanted)
        assert float(found[0, column]) == pytest.approx(float((said - wanted).square().mean()), rel=1e-5)
        assert run.stats.blocks_run == 16 * 2


def test_rows_that_a_gate_sends_across_are_those_rows_alone(given):
    """Rows leave on the way down, or behind the middle for good, or not at all; those that came back are not asked."""
    torch.manual_seed(0)
    model = UViT(6, 16).eval()
    exits = offramp.attach(model, at=[1, 2, 3, 5], head="uncertainty")
    for head in exits.modules.values():
        torch.nn.init.normal_(head.estimate.weight)
    given = {**given, "class_labels": torch.tensor([1, 2, 3])}
    with torch.no_grad(), offramp.enable(model, "uncertainty", threshold=0.5) as run:
        together = model(**given, return_dict=False)[0]
        depths = run.stats.last_depths.tolist()
        counted = run.stats.blocks_run
        alone = [model(**{k: v[i : i + 1] for k, v in given.items()}, return_dict=False)[0] for i in range(3)]
    assert len(set(depths)) > 1 and min(depths) < 3
    assert counted == sum({1: 2, 2: 4, 3: 3, 5: 5, 6: 6}[d] for d in depths)
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_each_row_goes_across_through_its_own_head(given, shaken):
    torch.manual_seed(0)
    model = shaken(UViT(6, 16))
    exits = offramp.attach(model, at=[1, 2], head="bottleneck", r=4)
    with torch.no_grad():
        bare = _at_one_and_two(model, given)
        for depth in exits.at:
            exits[depth].up.weight.normal_()
        together = _at_one_and_two(model, given)
        alone = [_at_one_and_two(model, {k: v[i : i + 1] for k, v in given.items()}) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert torch.allclose(together[0], bare[0], atol=1e-5)  # all blocks
    assert not torch.allclose(together[1], bare[1]) and not torch.allclose(together[2], bare[2])


def _at_one_and_two(model, given):
    """Rows at noise levels 9, 500 and 999: all 6 blocks, four, two."""
    with offramp.enable(model, "time_schedule", depths=(6, 2, 1)):
        told = {**given, "class_labels": torch.ones(len(given["timestep"]), dtype=torch.long)}
        return model(**told, return_dict=False)[0]


@pytest.mark.parametrize("depths", [(1,), (6, 2, 1), (6, 1, 1)])
def test_a_cache_on_top_adds_what_the_way_up_would(given, shaken, depths):
    """The same call twice: the second, which runs the first two blocks only, says the same."""
    torch.manual_seed(0)
    model = shaken(UViT(6, 16))
    told = {**given, "class_labels": torch.ones(3, dtype=torch.long)}
    with torch.no_grad(), offramp.enable(model, "time_schedule", depths=depths) as run:
        bare = model(**told, return_dict=False)[0]
        with deep_cache(model, 2, 2):
            one = model(**told, return_dict=False)[0]
            ran = run.stats.blocks_run
            two = model(**told, return_dict=False)[0]
    assert torch.equal(one, bare) and torch.allclose(two, bare, atol=1e-5)
    assert run.stats.blocks_run - ran < ran / 2 and run.stats.rows == 9


def test_blocks_behind_the_exit_do_not_run(model):
    images, labels = digits.load()
    judge, _ = digits.train_judge(images, labels, 1)
    with torch.no_grad():
        trial = Trial(judge, judge.features(images), 10, 4, DDIMScheduler)
    assert trial.run(Way("early", model, TimeSchedule((2,))), 0).saved == 0.5
    assert trial.run(Way("cached", model, None, "deep_cache", (2, 2)), 0).saved == 0.25


def test_models_that_the_demo_has(tmp_path):
    from rich.console import Console

    assert set(demo.PLANS) == set(demo.CACHES) == set(digits.MODELS)
    with pytest.raises(BadArgument, match="no model is called 'unet'; known: dit, uvit"):
        demo.run(tmp_path, True, Console(quiet=True), "unet")
