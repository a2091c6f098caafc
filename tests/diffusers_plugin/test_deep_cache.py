"""Deep blocks run at every few steps; in between, what they added last is added again."""

import pytest
import torch
from diffusers import UNet2DModel

import offramp
from offramp._plugins import adapt
from offramp.errors import BadArgument
from offramp_diffusers.deep_cache import deep_cache
from offramp_diffusers.policies.time_schedule import TimeSchedule


def noise(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


@pytest.fixture
def ran(dit):
    blocks = []
    for i, block in enumerate(dit.transformer_blocks):
        block.ff.register_forward_hook(lambda *_, i=i: blocks.append(i))
    return blocks


def test_deep_blocks_run_at_every_third_call(dit, batch, ran):
    full = noise(dit, batch)
    ran.clear()
    with deep_cache(dit, 2, 3):
        said = [noise(dit, batch) for _ in range(4)]
    assert ran == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 0, 1, 2, 3, 4, 5]
    assert all(torch.allclose(s, full, atol=1e-5) for s in said)  # the same input: what is added is right
    assert torch.equal(noise(dit, batch), full) and all("forward" not in b.__dict__ for b in dit.transformer_blocks)


def test_what_is_added_is_that_of_the_last_full_call(dit, batch):
    other = {**batch, "hidden_states": batch["hidden_states"] + 1}
    chain = adapt(dit).chain()
    states = []
    for given in (batch, other):
        with chain.capture([2, 6]) as kept:
            noise(dit, given)
        states.append(kept)
    wanted = states[1][2] + states[0][6] - states[0][2]
    with deep_cache(dit, 2, 2):
        noise(dit, batch)
        with adapt(dit).chain().capture([6]) as kept:
            noise(dit, other)
    assert torch.allclose(kept[6], wanted, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 4, 6])
def test_on_top_of_exits_only_blocks_before_the_exit_run(stop, dit, batch, ran):
    with offramp.enable(dit, TimeSchedule((stop,))):
        early = noise(dit, batch)
        ran.clear()
        with deep_cache(dit, 2, 2):
            said = [noise(dit, batch) for _ in range(2)]
    assert ran == [*range(stop), *range(min(stop, 2))]
    assert torch.equal(said[0], early) and torch.allclose(said[1], early, atol=1e-5)


def test_another_batch_size_runs_everything(dit, batch, ran):
    with deep_cache(dit, 2, 2):
        noise(dit, batch)
        ran.clear()
        noise(dit, {k: v[:1] for k, v in batch.items()})
    assert ran == list(range(6))


def test_exits_under_it_are_refused_with_the_order(dit, marks):
    with deep_cache(dit, 2, 2):
        before = marks(dit)
        with pytest.raises(BadArgument, match="deep_cache is on .* already.*its context inside that of enable"):
            offramp.enable(dit, TimeSchedule((3,)))
        assert marks(dit) == before


@pytest.mark.parametrize(("after", "interval"), [(0, 2), (6, 2), (2, 1), (True, 2), (2.0, 2)])
def test_bad_settings(after, interval, dit):
    with pytest.raises(BadArgument, match=r"give after from 1 to 5 and interval from 2 on"), deep_cache(
        dit, after, interval
    ):
        pass


def test_a_u_net_is_refused():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
    with pytest.raises(BadArgument, match="states of UNet2DModel change their size"), deep_cache(unet, 2, 2):
        pass
