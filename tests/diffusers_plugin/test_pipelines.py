"""Whole pipelines, tiny and without text encoders: fused, separate and extra passes, every solver, and starts in the
middle, each against the same pipeline with a model cut by hand."""

import importlib
from collections import Counter

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

import offramp
from offramp.enable import RUN
from offramp_diffusers.facts import model_facts

STEPS = 4
SIZE = {"height": 64, "width": 64}


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model.eval()


def vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).eval()


def dit(scheduler=None):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8,
        patch_size=2,
    )  # fmt: skip
    small = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = diffusers.DiTPipeline(shake(model), small.eval(), scheduler or DDIMScheduler())
    return pipe, {"class_labels": [1, 2], "output_type": "np"}


def pixart(scheduler=None):
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    pipe = diffusers.PixArtAlphaPipeline(None, None, None, shake(model), scheduler or DPMSolverMultistepScheduler())
    masks = {f"{n}prompt_attention_mask": torch.ones(1, 5) for n in ("", "negative_")}
    given = {"prompt_embeds": text(5), "negative_prompt_embeds": text(5), "negative_prompt": None, **masks, **SIZE}
    return pipe, {**given, "use_resolution_binning": False, "guidance_scale": 3.0, "output_type": "latent"}


def text(length, width=12):
    return torch.randn(1, length, width)


def sd3(scheduler=None):
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3Pipeline(shake(model), scheduler, *[None] * 7)
    pooled = {f"{n}pooled_prompt_embeds": torch.randn(1, 10) for n in ("", "negative_")}
    given = {"prompt_embeds": text(5), "negative_prompt_embeds": text(5), **pooled, **SIZE}
    # skip-layer guidance: an extra pass without block 1, in the middle of the run
    extra = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.8}
    return pipe, {**given, **extra, "guidance_scale": 3.0, "output_type": "latent"}


def flux(scheduler=None):
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, shake(model))
    pooled = {f"{n}pooled_prompt_embeds": torch.randn(1, 10) for n in ("", "negative_")}
    given = {"prompt_embeds": text(5), "negative_prompt_embeds": text(5), **pooled, **SIZE}
    return pipe, {**given, "true_cfg_scale": 2.0, "output_type": "latent"}


def wan(scheduler=None):
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = scheduler or UniPCMultistepScheduler(**flow)
    pipe = diffusers.WanPipeline(None, None, None, scheduler, shake(model))
    given = {"prompt_embeds": text(5), "negative_prompt_embeds": text(5), **SIZE, "num_frames": 5}
    return pipe, {**given, "guidance_scale": 3.0, "output_type": "latent"}


def ltx(scheduler=None):
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=4, caption_channels=12,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(scheduler or FlowMatchEulerDiscreteScheduler(), None, None, None, shake(model))
    masks = {f"{n}prompt_attention_mask": torch.ones(1, 5) for n in ("", "negative_")}
    given = {"prompt_embeds": text(5), "negative_prompt_embeds": text(5), **masks, **SIZE, "num_frames": 9}
    return pipe, {**given, "guidance_scale": 3.0, "output_type": "latent"}


def unet():
    return shake(
        UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip


def stable_diffusion(scheduler=None, kind=diffusers.StableDiffusionPipeline, **more):
    scheduler = scheduler or EulerDiscreteScheduler()
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = kind(vae=vae(), unet=unet(), scheduler=scheduler, **parts, **more, requires_safety_checker=False)
    given = {"prompt_embeds": text(5), "negative_prompt_embeds": text(5), "guidance_scale": 3.0}
    size = {"height": 16, "width": 16} if kind is diffusers.StableDiffusionPipeline else {}
    return pipe, {**given, **size, "output_type": "latent"}


PIPES = {make.__name__: make for make in (dit, pixart, sd3, flux, wan, ltx)}


def paint(pipe, given, steps=STEPS):
    """Return what a pipeline makes, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    made = pipe(**given, num_inference_steps=steps, generator=generator)
    return torch.as_tensor(made.images if hasattr(made, "images") else made.frames)


@pytest.fixture(params=PIPES)
def pipeline(request):
    return PIPES[request.param]()


def test_a_pipeline_at_one_depth_is_the_pipeline_of_the_shorter_model(pipeline, cut):
    pipe, given = pipeline
    full, own = paint(pipe, given), pipe.transformer
    pipe.transformer = cut(own, 3)
    wanted = paint(pipe, given)
    pipe.transformer = own
    with offramp.enable(pipe, "time_schedule", depths=(3,)) as run:
        assert torch.equal(paint(pipe, given), wanted)
    assert run.stats.saved > 0.2 and set(run.stats.exits) == {3} and not torch.equal(wanted, full)
    assert torch.equal(paint(pipe, given), full) and RUN not in own.__dict__


def test_runs_of_one_pipeline_know_nothing_of_each_other(pipeline):
    """Every call of the denoiser goes by its own noise level, so a second run decides as the first did."""
    pipe, given = pipeline
    asked = []
    with offramp.enable(pipe, "time_schedule", depths=(4, 3, 2), edges=(400.0, 800.0)) as run:
        driver = run.backbone
        levels = driver.noise

        def noise(args, kwargs):
            found = levels(args, kwargs)
            asked.extend(found)
            return found

        driver.noise = noise
        one, first, counted = paint(pipe, given), run.stats.to_dict(), list(asked)
        two = paint(pipe, given)
        del driver.noise
    assert torch.equal(one, two) and run.stats.rows == 2 * first["rows"] and asked == counted * 2
    wanted = {4 if level < 400 else 3 if level < 800 else 2 for level in counted}
    assert set(first["exits"]) == wanted and len(wanted) > 1 and max(counted) > 700


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_sampling_that_was_interrupted_leaves_the_next_one_clean(error, pipeline):
    pipe, given = pipeline
    full = paint(pipe, given)
    block = pipe.transformer.get_submodule(f"{model_facts(pipe.transformer).lists[0]}.1")
    with offramp.enable(pipe, "time_schedule", depths=(4, 2), edges=(600.0,)):
        early, left = paint(pipe, given), [3]

        def fail(*_):
            left[0] -= 1
            if not left[0]:
                raise error("enough")

        handle = next(iter(block.children())).register_forward_hook(fail)
        with pytest.raises(error):
            paint(pipe, given)
        handle.remove()
        assert torch.equal(paint(pipe, given), early)
    assert torch.equal(paint(pipe, given), full)


def settled(pipe):
    """Put the weights where torch puts new tensors: from a file they lie elsewhere, and kernels go by alignment."""
    for p in (*pipe.transformer.parameters(), *pipe.transformer.buffers()):
        p.data = p.data.clone()
    return pipe


def test_the_flag_goes_with_the_pipeline_and_auto_reads_it(pipeline, tmp_path):
    pipe, given = pipeline
    pipe.transformer.register_to_config(early_exit={"policy": "time_schedule", "depths": [4, 2], "edges": [600.0]})
    with offramp.enable(pipe):
        early = paint(pipe, given)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    plain = settled(type(pipe).from_pretrained(tmp_path, **absent))
    assert RUN not in plain.transformer.__dict__
    with offramp.enable(plain):
        assert torch.equal(paint(plain, given), early)
    auto = importlib.import_module("offramp.auto")
    auto.off()
    auto.on()
    try:
        loaded = settled(type(pipe).from_pretrained(tmp_path, **absent))
    finally:
        auto.off()
    assert torch.equal(paint(loaded, given), early) and loaded.transformer.__dict__[RUN].stats.saved > 0.1


SOLVERS = {
    "ddpm": (DDPMScheduler, 1), "ddim": (DDIMScheduler, 1), "dpmpp": (DPMSolverMultistepScheduler, 1),
    "euler": (EulerDiscreteScheduler, 1), "heun": (HeunDiscreteScheduler, 2), "unipc": (UniPCMultistepScheduler, 1),
}  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("make", [dit, stable_diffusion])
def test_every_solver_goes_by_the_noise_level(make, solver):
    kind, calls = SOLVERS[solver]
    pipe, given = make(kind())
    part = getattr(pipe, "transformer", None) or pipe.unet
    if part is pipe.components.get("unet"):
        offramp.attach(pipe, at=[1, 4], head="upsample")
    table = {"depths": (4, 2), "edges": (500.0,)} if make is dit else {"depths": (5, 1), "edges": (500.0,)}
    times = Counter()
    handle = part.register_forward_pre_hook(lambda m, a, k: times.update([level(a, k)]), with_kwargs=True)
    with offramp.enable(pipe, "time_schedule", **table) as run:
        assert paint(pipe, given, 5).isfinite().all()
    handle.remove()
    rows = 4 if make is dit else 2  # labels 1 and 2, or one prompt, beside as many without
    early = sum(n for t, n in times.items() if t >= 500)
    assert sum(times.values()) == 5 * calls - (calls - 1)
    late = sum(times.values()) - early
    assert run.stats.exits == {table["depths"][1]: rows * early, table["depths"][0]: rows * late}


def level(args, kwargs):
    """The time step of a call of a DiT or of a U-Net."""
    given = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return float(torch.as_tensor(given).flatten()[0])


@pytest.mark.parametrize("depth", [1, 4])
def test_a_controlnet_beside_a_u_net_that_leaves_early(depth):
    """A bottom that does not run gets nothing from the ControlNet, and what it is given keeps its shape."""
    control = shake(
        ControlNetModel(
            in_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(4, 8),
        )
    )  # fmt: skip
    pipe, given = stable_diffusion(kind=diffusers.StableDiffusionControlNetPipeline, controlnet=control)
    given |= {"image": torch.rand(1, 3, 16, 16)}
    full = paint(pipe, given)
    offramp.attach(pipe, at=[depth], head="upsample")
    with offramp.enable(pipe, "fixed", depth=depth) as run:
        early = paint(pipe, given)
        other = paint(pipe, {**given, "image": torch.rand(1, 3, 16, 16)})
    assert early.shape == full.shape and not torch.equal(early, other)
    assert run.stats.saved == pytest.approx(1 - {1: 2, 4: 4}[depth] / 5)
    assert torch.equal(paint(pipe, given), full)


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_a_start_in_the_middle_of_the_schedule(kind):
    pipe, given = stable_diffusion(kind=getattr(diffusers, f"StableDiffusion{kind}Pipeline"))
    given |= {"image": torch.rand(1, 3, 16, 16), "strength": 0.5}
    if kind == "Inpaint":
        given |= {"mask_image": (torch.rand(1, 1, 16, 16) > 0.5).float(), "height": 16, "width": 16}
    offramp.attach(pipe, at=[1, 4], head="upsample")
    times = []
    handle = pipe.unet.register_forward_pre_hook(lambda m, a, k: times.append(level(a, k)), with_kwargs=True)
    with offramp.enable(pipe, "time_schedule", depths=(5, 4, 1), edges=(200.0, 700.0)) as run:
        one = paint(pipe, given, 8)
        assert torch.equal(paint(pipe, given, 8), one)
    handle.remove()
    assert len(times) == 2 * 4 and max(times) < 700
    early = sum(t >= 200 for t in times)
    assert run.stats.exits == {4: 2 * early, 5: 2 * (len(times) - early)} and 0 < early < len(times)
