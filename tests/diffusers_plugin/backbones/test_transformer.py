"""A denoiser runs its first blocks only, and its own output layers read the state: saved work, exact undo."""

import copy
import importlib
from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DModel,
)
from torch import nn

import offramp
from offramp._plugins import adapt
from offramp.enable import RUN
from offramp.errors import BadArgument, UnsupportedModel
from offramp.policy import ExitPolicy
from offramp.testing.backbones import check_backbone
from offramp_diffusers.plugin import offramp_adapt

AT = (2, 4, 5)


@dataclass(frozen=True)
class Plan(ExitPolicy):
    """Row i leaves at the exit with index plan[i]; no such exit: it runs to the end."""

    plan: tuple

    def start(self, batch, device):
        return {"plan": torch.tensor(self.plan[:batch])}

    def step(self, state, seen):
        return state["plan"] == seen.index, state


def noise(model, batch):
    return model(**batch, return_dict=False)[0]


def calls(model):
    """Count the rows of every call of every block's own work."""
    seen = []
    hooks = [b.ff.register_forward_hook(lambda m, a, out: seen.append(len(out))) for b in model.transformer_blocks]
    return seen, lambda: [h.remove() for h in hooks]


def test_the_backbone_keeps_its_contract(dit, batch):
    check_backbone(adapt(dit), batch)


@torch.no_grad()
def test_fixed_is_the_truncated_model_and_saves_blocks(dit, batch, cut):
    full, short = noise(dit, batch), noise(cut(dit, 2), batch)
    offramp.attach(dit, at=[2, 4], head="passthrough")
    with offramp.enable(dit, "fixed", depth=2) as run:
        seen, undo = calls(dit)
        out = dit(batch["hidden_states"], timestep=batch["timestep"], class_labels=batch["class_labels"])
        undo()
    assert type(out).__name__ == "Transformer2DModelOutput" and torch.equal(out.sample, short)
    assert seen == [4, 4] and (run.stats.blocks_run, run.stats.blocks_full) == (8, 24)
    assert run.stats.saved == pytest.approx(2 / 3) and run.stats.last_depths.tolist() == [2] * 4
    assert not torch.equal(short, full) and torch.equal(noise(dit, batch), full)


@torch.no_grad()
def test_rows_leave_one_by_one_with_their_own_timestep_and_label(dit, batch, cut):
    plan = (2, 9, 0, 1)
    alone = [noise(cut(dit, [*AT, 6][min(p, 3)]), batch)[i] for i, p in enumerate(plan)]
    offramp.attach(dit, AT, head="passthrough")
    with offramp.enable(dit, Plan(plan)) as run:
        seen, undo = calls(dit)
        out = noise(dit, batch)
        undo()
    assert seen == [4, 4, 3, 3, 2, 1] and run.stats.last_depths.tolist() == [5, 6, 2, 4]
    for got, wanted in zip(out, alone, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


@torch.no_grad()
def test_one_timestep_for_the_whole_batch(dit, batch):
    batch["timestep"] = torch.tensor([500])
    offramp.attach(dit, AT, head="passthrough")
    with offramp.enable(dit, Plan((0, 9, 9, 0))):
        out = noise(dit, batch)
    assert torch.allclose(out[1:3], noise(dit, batch)[1:3], atol=1e-5)


@torch.no_grad()
def test_saturation_decides_a_batch_as_its_rows_alone(dit, batch):
    offramp.attach(dit, at=[1, 2, 3, 4, 5], head="passthrough")
    with offramp.enable(dit, "never"), pytest.raises(offramp.OfframpError, match="already enabled"):
        offramp.enable(dit, "saturation", threshold=0.9)
    states = adapt_states(dit, batch)
    near = torch.stack([torch.cosine_similarity(a, b, -1) for a, b in zip(states[:-1], states[1:], strict=True)])
    with offramp.enable(dit, "saturation", threshold=near[0].median().item()) as run:
        out, depths = noise(dit, batch), run.stats.last_depths
        assert len(depths.unique()) > 1
        for i in range(4):
            one = noise(dit, {k: v[i : i + 1] for k, v in batch.items()})
            assert torch.allclose(one[0], out[i], atol=1e-5) and run.stats.last_depths.item() == depths[i]


def adapt_states(dit, batch):
    backbone = dit.__dict__["_offramp_exits"].backbone
    seen = backbone.observe(batch, [1, 2, 3, 4, 5])
    return [h.reshape(4, -1) for h in seen.hidden]


@torch.no_grad()
def test_undo_is_exact(dit, batch, marks):
    before, full, keys = marks(dit), noise(dit, batch), list(dit.state_dict())
    exits = offramp.attach(dit, AT, head="passthrough")
    assert list(dit.state_dict()) == keys
    run = offramp.enable(dit, "fixed", depth=2)
    noise(dit, batch)
    run.disable()
    assert torch.equal(noise(dit, batch), full)
    exits.detach()
    assert torch.equal(noise(dit, batch), full) and list(dit.state_dict()) == keys and marks(dit) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_what_a_forward_raises_leaves_no_trace(error, dit, batch, marks):
    full, before = noise(dit, batch), marks(dit)

    def fail(*_):
        raise error("inside block 4")

    offramp.attach(dit, AT, head="passthrough")
    with offramp.enable(dit, Plan((2, 9, 0, 1))) as run:
        wanted, first = noise(dit, batch), run.stats.to_dict()
        broken = dit.transformer_blocks[4].ff.register_forward_hook(fail)
        with pytest.raises(error, match="inside block 4"):
            noise(dit, batch)
        broken.remove()
        assert run.stats.to_dict() == first and torch.equal(noise(dit, batch), wanted)
    run.exits.detach()
    assert torch.equal(noise(dit, batch), full) and marks(dit) == before


@torch.no_grad()
def test_deep_copies_are_independent(dit, batch):
    full = noise(dit, batch)
    offramp.attach(dit, AT, head="passthrough")
    run = offramp.enable(dit, "fixed", depth=2)
    early, other = noise(dit, batch), copy.deepcopy(dit)
    assert torch.equal(noise(other, batch), early) and run.stats.rows == 4
    other.__dict__[RUN].disable()
    assert torch.equal(noise(other, batch), full) and torch.equal(noise(dit, batch), early) and run.enabled
    other.__dict__["_offramp_exits"].detach()
    run.disable()
    assert torch.equal(noise(dit, batch), full) and run.exits.at == AT and run.exits[2] is not None


@torch.no_grad()
def test_nan_states_run_to_the_end(dit, batch):
    batch["hidden_states"][1] = float("nan")
    offramp.attach(dit, at=[2], head="passthrough")
    with offramp.enable(dit, "fixed", depth=2) as run:
        noise(dit, batch)
    assert run.stats.last_depths.tolist() == [2, 6, 2, 2] and run.stats.nonfinite == 1


def test_save_and_load(dit, make, batch, tmp_path):
    offramp.attach(dit, AT, head="passthrough").save(tmp_path)
    other = make()
    assert offramp.load(other, tmp_path).at == AT
    with pytest.raises(offramp.OfframpError, match="depth"):
        offramp.load(make(num_layers=4), tmp_path)


@pytest.fixture
def pipe(dit):
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 8}
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), **small)
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    pipe = DiTPipeline(transformer=dit, vae=vae.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe):
    made = pipe([1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="np")
    return torch.from_numpy(made.images)


def test_inside_a_pipeline(pipe):
    full = paint(pipe)
    offramp.attach(pipe.transformer, at=[2], head="passthrough")
    with offramp.enable(pipe.transformer, "fixed", depth=2) as run:
        early = paint(pipe)
    assert run.stats.rows == 12 and run.stats.exits == {2: 12} and run.stats.saved == pytest.approx(2 / 3)
    assert early.shape == full.shape == (2, 8, 8, 3) and not torch.equal(early, full)
    assert torch.equal(paint(pipe), full)
    with offramp.enable(pipe.transformer, "never") as run:
        assert torch.equal(paint(pipe), full) and run.stats.saved == 0


@pytest.mark.parametrize("head", ["tied", "linear", "translator"])
def test_heads_that_copy_the_readout_are_refused(head, dit, marks):
    before = marks(dit)
    with pytest.raises(BadArgument, match='also take the timestep.*head="passthrough"'):
        offramp.attach(dit, at=[2], head=head)
    assert marks(dit) == before


@pytest.mark.parametrize(
    ("policy", "looks"), [("confidence", "top1"), ("margin", "margin"), ("entropy", "entropy"), ("patience", "label")]
)
def test_policies_that_look_at_a_prediction_are_refused(policy, looks, dit, marks):
    offramp.attach(dit, AT, head="passthrough")
    before, options = marks(dit), {"patience": 1} if policy == "patience" else {"threshold": 0.5}
    with pytest.raises(BadArgument, match=f"looks at .*{looks}.*Policies that work here: .*fixed, never.*saturation"):
        offramp.enable(dit, policy, **options)
    assert marks(dit) == before


def test_what_has_no_meaning_here_is_refused(dit, batch):
    exits = offramp.attach(dit, AT, head="passthrough")
    with pytest.raises(BadArgument, match="verify=True is for models that generate"):
        offramp.enable(dit, "fixed", depth=2, verify=True)
    with pytest.raises(BadArgument, match="window=5 is for models that generate"):
        offramp.enable(dit, "fixed", depth=2, window=5)
    with pytest.raises(BadArgument, match="nothing to record or to fit"):
        offramp.record(dit, [batch])
    with pytest.raises(BadArgument):
        offramp.fit(dit, [batch], progress=False)
    with pytest.raises(BadArgument, match="a mapping of its own arguments"):
        exits.backbone.observe(batch["hidden_states"], [2])
    state = torch.randn(2, 16, 16)
    assert exits[2](state) is state


def test_passthrough_is_refused_on_classifiers():
    from offramp.testing.toy import ToyModel, toy_plugin

    with toy_plugin(), pytest.raises(BadArgument, match='answers with 5 classes: use head="tied"'):
        offramp.attach(ToyModel(), at=[2], head="passthrough")


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip


def sana():
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=4, num_attention_heads=2, attention_head_dim=8, patch_size=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("build", [pixart, sana])
@torch.no_grad()
def test_relatives_by_structure(build, cut):
    model = build()
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * 0.1)
    model.eval()
    batch = {
        "hidden_states": torch.randn(3, 4, 8, 8),
        "timestep": torch.tensor([9, 5, 1]),
        "encoder_hidden_states": torch.randn(3, 5, 12),
        "encoder_attention_mask": torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2, [1.0] * 4 + [0.0]]),
    }
    if build is pixart:
        batch["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    short = noise(cut(model, 2), batch)
    full = noise(model, batch)
    offramp.attach(model, at=[2, 3], head="passthrough")
    with offramp.enable(model, Plan((0, 9, 0))):
        out = noise(model, batch)
    assert torch.allclose(out[[0, 2]], short[[0, 2]], atol=1e-5) and torch.allclose(out[1], full[1], atol=1e-5)


def unet():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks)


def test_what_is_not_understood_is_refused_with_what_to_declare():
    with pytest.raises(UnsupportedModel, match="AutoencoderKL is a diffusers model that offramp has no facts.*declare"):
        offramp.attach(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), at=[1], head="passthrough")


def test_one_block_and_strangers(make):
    assert offramp_adapt(nn.Linear(2, 2)) is None
    with pytest.raises(UnsupportedModel, match="has 1 block"):
        offramp.attach(make(num_layers=1), at=[1], head="passthrough")


@pytest.fixture
def auto():
    from diffusers.models.modeling_utils import ModelMixin

    module = importlib.import_module("offramp.auto")
    module.off()
    before = ModelMixin.__dict__["from_pretrained"]
    module.on()
    yield module
    module.off()
    assert ModelMixin.__dict__["from_pretrained"] is before


def test_the_flag_in_the_components_config(dit, batch):
    dit.register_to_config(early_exit={"policy": "fixed", "depth": 2})
    offramp.attach(dit, at=[2], head="passthrough")
    with offramp.enable(dit) as run:
        noise(dit, batch)
    assert run.stats.exits == {2: 4}


def test_loaded_components_with_the_flag_come_enabled(auto, pipe, batch, tmp_path):
    offramp.attach(pipe.transformer, at=[2], head="passthrough").save(tmp_path / "exits")
    pipe.transformer.__dict__["_offramp_exits"].detach()
    flag = {"policy": "fixed", "depth": 2, "exits": str(tmp_path / "exits")}
    pipe.transformer.register_to_config(early_exit=flag)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = DiTPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    paint(loaded)
    assert loaded.transformer.__dict__[RUN].stats.exits == {2: 12}
    auto.off()
    assert RUN not in type(pipe.transformer).from_pretrained(tmp_path / "pipe" / "transformer").__dict__
