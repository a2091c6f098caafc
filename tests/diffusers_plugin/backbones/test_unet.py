"""A U-Net leaves on its way up: later up blocks do not run, and a trained map brings the state to the output layers."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

import offramp
from offramp._plugins import adapt
from offramp.errors import BadArgument
from offramp_diffusers.tune_heads import tune_heads


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model.eval()


def plain():
    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16, 24),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    return shake(model), {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([900, 900])}


def conditioned():
    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    given = {"sample": torch.randn(2, 4, 16, 16), "timestep": 900, "encoder_hidden_states": torch.randn(2, 5, 12)}
    return shake(model), given


@pytest.fixture(params=[plain, conditioned])
def unet(request):
    torch.manual_seed(0)
    return request.param()


def said(model, batch):
    with torch.no_grad():
        return model(**batch).sample


def depths(model):
    """Depths at which an exit can be."""
    first = len(model.down_blocks) + 2
    return range(first, first + len(model.up_blocks) - 1)


@pytest.mark.parametrize("way", ["fixed", "time_schedule"])
def test_later_up_blocks_do_not_run_and_the_head_is_asked(way, unet, marks):
    model, batch = unet
    before, full = marks(model), said(model, batch)
    for depth in depths(model):
        exits = offramp.attach(model, at=[depth], head="upsample")
        with torch.no_grad():
            exits[depth].map.weight.normal_()
        ran, states = [], []
        handles = []
        for i, block in enumerate(model.up_blocks):
            handles.append(block.resnets[0].register_forward_hook(lambda *_, i=i, ran=ran: ran.append(i)))
        index = depth - len(model.down_blocks) - 2
        look = lambda _, args, out, states=states: states.append(out)  # noqa: E731
        handles.append(model.conv_norm_out.register_forward_hook(look))
        options = {"depth": depth} if way == "fixed" else {"depths": (depth,)}
        with offramp.enable(model, way, **options) as run:
            out = said(model, batch)
        for handle in handles:
            handle.remove()
        assert ran == list(range(index + 1)) and out.shape == full.shape
        assert states[0].shape == (2, model.conv_norm_out.num_channels, 16, 16)
        assert (run.stats.blocks_run, run.stats.blocks_full) == (2 * depth, 2 * exits.backbone.depth)
        exits.detach()
    assert torch.equal(said(model, batch), full) and marks(model) == before


def test_the_answer_is_that_of_a_model_cut_by_hand(unet):
    model, batch = unet
    depth = depths(model)[-1]
    exits = offramp.attach(model, at=[depth], head="upsample")
    with torch.no_grad():
        exits[depth].map.weight.normal_()
    with offramp.enable(model, "time_schedule", depths=(depth,)):
        got = said(model, batch)
    head = copy.deepcopy(exits[depth])
    exits.detach()
    model.up_blocks[-1].forward = lambda *args, **kwargs: head(kwargs["hidden_states"] if kwargs else args[0])
    assert torch.equal(said(model, batch), got)


def test_never_and_a_schedule_that_runs_everything_change_nothing(unet):
    model, batch = unet
    full, depth = said(model, batch), depths(model)[0]
    with offramp.attach(model, at=[depth], head="upsample"):
        with offramp.enable(model, "never"):
            assert torch.equal(said(model, batch), full)
        with offramp.enable(model, "time_schedule", depths=(depth, 1.0), edges=(500.0,)):
            assert torch.equal(said(model, batch), full)


def test_compiled_blocks_leave_as_the_others_do(unet):
    model, batch = unet
    depth = depths(model)[-1]
    with offramp.attach(model, at=[depth], head="upsample"), offramp.enable(model, "fixed", depth=depth):
        plain_says = said(model, batch)
    for blocks in (model.down_blocks, model.up_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = torch.compile(block, backend="eager")
    with offramp.attach(model, at=[depth], head="upsample"), offramp.enable(model, "fixed", depth=depth) as run:
        assert torch.allclose(said(model, batch), plain_says, atol=1e-5)
    assert run.stats.last_depths.tolist() == [depth] * 2


def test_heads_are_trained_and_the_model_is_not(unet):
    model, batch = unet
    before = copy.deepcopy(model.state_dict())
    exits = offramp.attach(model, at=[depths(model)[-1]], head="upsample")
    data = {"sample": torch.ones(16, *batch["sample"].shape[1:])}
    if "encoder_hidden_states" in batch:
        data["encoder_hidden_states"] = torch.randn(16, 5, 12)
    report = tune_heads(model, data, DDPMScheduler(prediction_type="sample"), steps=80, lr=3e-2, progress=False)
    # a shaken model's output layers can say little else than they do, but what they say does not depend on chance
    assert max(report.losses[-10:]) < report.losses[0] - 0.01
    exits.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_places_without_an_exit_are_refused(unet):
    model, batch = unet
    with pytest.raises(BadArgument, match="after a down or an up block of a U-Net, and depth . is mid_block"):
        offramp.attach(model, at=[len(model.down_blocks) + 1], head="upsample")
    depth = depths(model)[0]
    offramp.attach(model, at=[depth], head="passthrough")
    with pytest.raises(BadArgument, match='attach with head="upsample"'):
        offramp.enable(model, "fixed", depth=depth)


def test_rows_cannot_go_their_own_ways():
    model, batch = plain()
    depth = depths(model)[0]
    offramp.attach(model, at=[depth], head="upsample")
    batch["timestep"] = torch.tensor([100, 900])
    with (
        offramp.enable(model, "time_schedule", depths=(1.0, depth)),
        pytest.raises(BadArgument, match="states of different blocks have different sizes"),
    ):
        said(model, batch)


def test_a_schedule_needs_an_exit_at_each_depth(unet):
    model, _ = unet
    with pytest.raises(BadArgument, match="where no head was attached"):
        offramp.enable(model, "time_schedule")


def levels(model):
    """Depths on the way down from which a state can go straight across."""
    return range(1, len(model.down_blocks) + 1)


def across(model, depth):
    """A model whose bottom was cut out by hand: its exit brings the state to the up block of the same level."""
    exits = model.__dict__["_offramp_exits"]
    head, blocks = copy.deepcopy(exits[depth]), exits.backbone.blocks()
    exits.detach()
    kept = {}

    def down(i):
        def forward(hidden_states, *_, **__):
            kept.setdefault("state", hidden_states)
            return hidden_states, (hidden_states,) * (len(blocks[i].resnets) + (blocks[i].downsamplers is not None))

        return forward

    for i in range(depth, len(model.down_blocks)):
        blocks[i].forward = down(i)

    def middle(hidden_states, *_, **__):
        kept.setdefault("state", hidden_states)
        return hidden_states

    for block in blocks[len(model.down_blocks) : len(blocks) - depth]:
        block.forward = middle
    goes_on = blocks[len(blocks) - depth]
    own = goes_on.forward

    def forward(*args, **kwargs):
        state = head(kept.pop("state"))
        return own(**{**kwargs, "hidden_states": state}) if kwargs else own(state, *args[1:])

    goes_on.forward = forward
    return model


@pytest.mark.parametrize("way", ["fixed", "time_schedule"])
def test_the_bottom_does_not_run_and_the_rest_is_the_model_cut_by_hand(way, unet, marks):
    model, batch = unet
    before, full, blocks = marks(model), said(model, batch), adapt(model).blocks()
    for depth in levels(model):
        exits = offramp.attach(model, at=[depth], head="upsample")
        with torch.no_grad():
            exits[depth].map.weight.normal_()
        wanted = said(across(*copy.deepcopy((model, depth))), batch)
        ran, handles = set(), []
        for i, block in enumerate(blocks):
            for leaf in (m for m in block.modules() if not list(m.children())):
                handles.append(leaf.register_forward_hook(lambda *_, i=i, ran=ran: ran.add(i)))
        options = {"depth": depth} if way == "fixed" else {"depths": (depth,)}
        with offramp.enable(model, way, **options) as run:
            assert torch.equal(said(model, batch), wanted)
        for handle in handles:
            handle.remove()
        assert sorted(ran) == [*range(depth), *range(len(blocks) - depth, len(blocks))]
        assert (run.stats.blocks_run, run.stats.blocks_full) == (2 * 2 * depth, 2 * len(blocks))
        assert run.stats.last_depths.tolist() == [depth] * 2
        exits.detach()
    assert torch.equal(said(model, batch), full) and marks(model) == before


def test_flops_fall_with_the_bottom_and_with_the_end(unet):
    model, batch = unet
    full, found = flops(model, batch), []
    places = [*levels(model), *depths(model)]
    exits = offramp.attach(model, at=places, head="upsample")
    for depth in places:
        with offramp.enable(model, "time_schedule", depths=(depth,)):
            found.append(flops(model, batch))
    exits.detach()
    down, up = found[: len(model.down_blocks)], found[len(model.down_blocks) :]
    assert down == sorted(down) and up == sorted(up) and len(set(found)) == len(found) and max(found) < full


def flops(model, batch):
    with FlopCounterMode(display=False) as counter:
        said(model, batch)
    return counter.get_total_flops()


def test_a_controlnet_adds_to_the_levels_that_run(unet):
    model, batch = unet
    if isinstance(model, UNet2DModel):
        return
    kept = []
    handles = [b.register_forward_hook(lambda m, a, out: kept.extend(out[1])) for b in model.down_blocks]
    handles.append(model.conv_in.register_forward_hook(lambda m, a, out: kept.append(out)))
    middle = []
    handles.append(model.mid_block.register_forward_hook(lambda m, a, out: middle.append(out)))
    said(model, batch)
    for handle in handles:
        handle.remove()
    extra = {
        "down_block_additional_residuals": [torch.randn_like(k) for k in kept],
        "mid_block_additional_residual": torch.randn_like(middle[0]),
    }
    offramp.attach(model, at=[1], head="upsample")
    with offramp.enable(model, "fixed", depth=1):
        plain, controlled = said(model, batch), said(model, {**batch, **extra})
        extra["mid_block_additional_residual"] *= 5  # of the bottom, which does not run
        assert torch.equal(said(model, {**batch, **extra}), controlled)
        extra["down_block_additional_residuals"][0] *= 5
        assert not torch.equal(said(model, {**batch, **extra}), controlled) and not torch.equal(plain, controlled)
        adapter = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 8, 8)]
        with pytest.raises((BadArgument, RuntimeError)):
            said(model, {**batch, "down_intrablock_additional_residuals": adapter})


def test_odd_sizes_come_back_as_they_were(unet):
    model, batch = unet
    batch = {**batch, "sample": batch["sample"][..., :13, :11]}
    if isinstance(model, UNet2DModel):
        with pytest.raises(RuntimeError):  # the model itself takes no such size
            said(model, batch)
        return
    full = said(model, batch)
    for depth in [*levels(model), *depths(model)]:
        with offramp.attach(model, at=[depth], head="upsample"), offramp.enable(model, "fixed", depth=depth):
            assert said(model, batch).shape == full.shape


def test_the_way_across_is_trained(unet):
    model, batch = unet
    exits = offramp.attach(model, at=[1], head="upsample")
    data = {"sample": torch.ones(8, *batch["sample"].shape[1:])}
    if "encoder_hidden_states" in batch:
        data["encoder_hidden_states"] = torch.randn(8, 5, 12)
    start = exits[1].map.weight.clone()
    options = {"steps": 20, "lr": 1e-2, "batch_size": 8, "progress": False}
    report = tune_heads(model, data, DDPMScheduler(prediction_type="sample"), **options)
    assert not torch.equal(exits[1].map.weight, start) and sum(report.losses[-4:]) < sum(report.losses[:4])
