"""The trained map before the output layers: nothing at first, then what training makes of it, row by row."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument


def noise(model, batch):
    return model(**batch, return_dict=False)[0]


@torch.no_grad()
def test_untrained_it_is_the_passthrough_and_trained_it_is_not(dit, batch):
    offramp.attach(dit, at=[2], head="passthrough")
    with offramp.enable(dit, "fixed", depth=2):
        bare = noise(dit, batch)
    dit.__dict__["_offramp_exits"].detach()
    exits = offramp.attach(dit, at=[2], head="bottleneck", r=4)
    with offramp.enable(dit, "fixed", depth=2):
        assert torch.equal(noise(dit, batch), bare)
        exits[2].up.weight.normal_()
        assert not torch.equal(noise(dit, batch), bare)


@torch.no_grad()
def test_each_row_goes_through_its_own(dit, batch):
    exits = offramp.attach(dit, at=[2, 4], head="bottleneck", r=4)
    for depth in exits.at:
        exits[depth].up.weight.normal_()
    plan = offramp.policy("time_schedule", depths=(6, 4, 2), edges=(200.0, 400.0))
    with offramp.enable(dit, plan) as run:
        together = noise(dit, batch)
        assert run.stats.last_depths.tolist() == [2, 2, 4, 6]
        for i in range(4):
            alone = noise(dit, {k: v[i : i + 1] for k, v in batch.items()})
            assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_gradients_reach_it(dit, batch):
    exits = offramp.attach(dit, at=[2], head="bottleneck", r=4)
    with offramp.enable(dit, "fixed", depth=2):
        noise(dit, batch).square().mean().backward()
    assert exits[2].up.weight.grad.abs().sum() > 0
    assert dit.transformer_blocks[3].ff.net[2].weight.grad is None


def test_a_schedule_needs_a_head_at_each_of_its_depths(dit):
    offramp.attach(dit, at=[2], head="bottleneck")
    with pytest.raises(BadArgument, match=r"stops at \[3\], where no head was attached"):
        offramp.enable(dit, "time_schedule", depths=[6, 3, 2])


@pytest.mark.parametrize("r", [0, -1, 2.5, True])
def test_bad_width(dit, r):
    with pytest.raises(BadArgument, match="r must be a whole number"):
        offramp.attach(dit, at=[2], head="bottleneck", r=r)


def test_save_and_load(dit, make, batch, tmp_path):
    exits = offramp.attach(dit, at=[2], head="bottleneck", r=4)
    with torch.no_grad():
        exits[2].up.weight.normal_()
    exits.save(tmp_path)
    again = offramp.load(make(), tmp_path)
    assert torch.equal(again[2].up.weight, exits[2].up.weight)


def test_a_bin_between_two_whole_levels_needs_its_head_too(dit):
    offramp.attach(dit, at=[2], head="bottleneck", r=4)
    with pytest.raises(BadArgument, match=r"stops at \[4\], where no head was attached"):
        offramp.enable(dit, "time_schedule", depths=(6, 4, 2), edges=(500.2, 500.7))
