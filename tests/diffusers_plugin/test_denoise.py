"""Exits among schedulers, caches, controls, offloading, casting and compilers: each known trap has a test."""

import copy

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)

import offramp
from offramp.enable import RUN
from offramp.errors import BadArgument, NotAttached, UnsupportedModel

TABLE = {"depths": (6, 4, 2), "edges": (300.0, 700.0)}


def noise(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def at(batch, level):
    """The same batch at one noise level."""
    return {**batch, "timestep": torch.full_like(batch["timestep"], level)}


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        (DDPMScheduler, 5), (DDIMScheduler, 5), (DPMSolverMultistepScheduler, 5), (EulerDiscreteScheduler, 5),
        (HeunDiscreteScheduler, 9), (UniPCMultistepScheduler, 5), (FlowMatchEulerDiscreteScheduler, 5),
    ],
)  # fmt: skip
def test_every_solver_goes_by_the_same_table(kind, calls, dit, batch):
    """Second-order solvers call twice a step; a table over noise levels needs to know nothing of it."""
    scheduler, seen = kind(), []
    scheduler.set_timesteps(5)
    x, plan = batch["hidden_states"], offramp.policy("time_schedule", **TABLE)
    with offramp.enable(dit, plan) as run:
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            e = noise(dit, {**batch, "hidden_states": model_input, "timestep": t.expand(4)})
            x = scheduler.step(e, t, x).prev_sample
            seen.append((float(t), run.stats.last_depths.tolist()))
    assert len(seen) == calls and x.isfinite().all()
    for t, depths in seen:
        assert depths == [6 if t < 300 else 4 if t < 700 else 2] * 4, t
    assert 0.2 < run.stats.saved < 0.7


def test_image_to_image_starts_in_the_middle_and_runs_are_independent(dit, batch):
    """Nothing is counted in steps, so a second run, or one that starts late, decides as the first did."""
    with offramp.enable(dit, "time_schedule", **TABLE) as run:
        for level, depth in ((900, 2), (100, 6), (500, 4), (900, 2), (100, 6)):
            noise(dit, at(batch, level))
            assert run.stats.last_depths.tolist() == [depth] * 4


def test_an_interrupted_call_leaves_the_next_one_clean(dit, batch):
    full = noise(dit, at(batch, 100))
    with offramp.enable(dit, "time_schedule", **TABLE) as run:
        wanted = noise(dit, at(batch, 900))
        handle = dit.transformer_blocks[1].ff.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            noise(dit, at(batch, 900))
        handle.remove()
        assert torch.equal(noise(dit, at(batch, 100)), full) and torch.equal(noise(dit, at(batch, 900)), wanted)
        assert run.stats.rows == 12


def test_enabling_twice_and_two_pipelines_with_one_transformer(dit):
    offramp.enable(dit, "time_schedule", **TABLE)
    with pytest.raises(NotAttached, match="already enabled on this model; first: run.disable"):
        offramp.enable(dit, "time_schedule")


def test_a_call_without_its_noise_level_is_refused(dit, batch):
    with offramp.enable(dit, "time_schedule", **TABLE):
        with pytest.raises(BadArgument, match="has no `timestep`"):
            dit(batch["hidden_states"], class_labels=batch["class_labels"])
        with pytest.raises(BadArgument, match="outside this model's range"):
            noise(dit, at(batch, 1500))
        with pytest.raises(BadArgument, match="3 noise levels for a batch of 4"):
            noise(dit, {**batch, "timestep": torch.tensor([1, 500, 900])})


@pytest.fixture
def sd3():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10), "timestep": torch.tensor([900.0, 900.0]),
    }  # fmt: skip
    return model.eval(), given


def test_control_residuals_after_the_exit_do_not_count(sd3):
    """SD3 adds ControlNet's residuals after skipped blocks too; only those of blocks that ran may be read."""
    model, given = sd3
    controls = [torch.randn(2, 16, 16) for _ in range(6)]
    short = copy.deepcopy(model)
    short.transformer_blocks = short.transformer_blocks[:2]
    wanted = noise(short, {**given, "block_controlnet_hidden_states": controls[:2]})
    with offramp.enable(model, "time_schedule", **TABLE):
        got = noise(model, {**given, "block_controlnet_hidden_states": controls})
    assert torch.equal(got, wanted)


def test_skip_layer_guidance_still_skips(sd3):
    """Blocks that the model itself leaves out of a call are not called, and the rest goes by the table."""
    model, given = sd3
    short = copy.deepcopy(model)
    del short.transformer_blocks[1]
    short.transformer_blocks = short.transformer_blocks[:3]
    with offramp.enable(model, "time_schedule", depths=(4,)):
        assert torch.equal(noise(model, {**given, "skip_layers": [1]}), noise(short, given))


@pytest.fixture
def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 10), "timestep": torch.tensor([0.9]), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model.eval(), given


CACHES = {
    "first_block": lambda: FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda: MagCacheConfig(threshold=10.0, num_inference_steps=4, retention_ratio=0.0, mag_ratios=[1.0] * 4),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_go_on_top_and_the_first_call_is_exact(cache, flux):
    model, given = flux
    blocks = []
    for i, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):
        inner = block.attn
        inner.register_forward_hook(lambda *_, i=i: blocks.append(i))
    run = offramp.enable(model, "time_schedule", **TABLE)
    early = noise(model, given)
    model.enable_cache(CACHES[cache]())
    blocks.clear()
    with model.cache_context("cond"):
        assert torch.equal(noise(model, given), early)
        first, blocks[:] = list(blocks), []
        noise(model, {**given, "timestep": torch.tensor([0.85])})
    assert first == [0, 1] and len(blocks) < len(first)  # the second call ran the first block only, or nothing
    run.disable()
    with model.cache_context("uncond"):
        blocks.clear()
        full = noise(model, given)
        assert blocks == list(range(6))  # the cache is still on, over the full model
    model.disable_cache()
    assert torch.equal(noise(model, given), full)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_is_on_already_is_refused_with_the_order(cache, flux, marks):
    model, _ = flux
    model.enable_cache(CACHES[cache]())
    before = marks(model)
    with pytest.raises(BadArgument, match=r"Cache is on .* already.*model.disable_cache\(\), then offramp.enable"):
        offramp.enable(model, "time_schedule", **TABLE)
    assert marks(model) == before


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_on_top_of_heads_with_maps_of_their_own_is_refused(cache, flux):
    """What the cache adds at a step that it skips never went through the head of the exit."""
    model, given = flux
    offramp.attach(model, at=[2], head="bottleneck")
    with offramp.enable(model, "fixed", depth=2) as run:
        model.enable_cache(CACHES[cache]())
        with model.cache_context("cond"), pytest.raises(BadArgument, match=r"Cache is on top of exits with heads"):
            noise(model, given)
        model.disable_cache()
        assert noise(model, given).isfinite().all() and run.stats.exits == {2: 1}


@pytest.mark.parametrize("first", ["exits", "cache"])
def test_pyramid_attention_broadcast_in_both_orders(first, flux):
    """It lives inside the attention of blocks that run: every second one is left out, and those behind the exit never
    run at all, as in the model that ends there."""
    model, given = flux
    short = copy.deepcopy(model)
    short.transformer_blocks, short.single_transformer_blocks = short.transformer_blocks[:2], torch.nn.ModuleList()
    steps = [{**given, "hidden_states": torch.randn(1, 16, 4)} for _ in range(4)]
    pab = {
        "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 950),
        "current_timestep_callback": lambda: 900,
    }  # fmt: skip
    ran, blocks = [], [*model.transformer_blocks, *model.single_transformer_blocks]
    for i, block in enumerate(blocks):
        block.attn.to_q.register_forward_hook(lambda *_, i=i: ran.append(i))
    exits = offramp.enable(model, "time_schedule", **TABLE) if first == "exits" else None
    for one in (model, short):
        one.enable_cache(PyramidAttentionBroadcastConfig(**pab))
    exits = exits or offramp.enable(model, "time_schedule", **TABLE)
    with model.cache_context("cond"), short.cache_context("cond"):
        assert all(torch.equal(noise(model, step), noise(short, step)) for step in steps)
    assert ran == [0, 1, 0, 1] and exits.stats.exits == {2: 4}
    model._reset_stateful_cache()  # what a pipeline does in the end
    exits.disable()
    model.disable_cache()
    ran.clear()
    noise(model, given)
    assert ran == list(range(6))


def test_hooks_that_another_library_took_off_are_noticed(dit, batch):
    run = offramp.enable(dit, "time_schedule", **TABLE)
    for block in dit.transformer_blocks:
        block.__dict__.pop("forward")
    with pytest.raises(BadArgument, match="took offramp's hooks off the blocks"):
        noise(dit, batch)
    run.disable()
    with offramp.enable(dit, "time_schedule", **TABLE) as run:
        noise(dit, at(batch, 900))
    assert run.stats.last_depths.tolist() == [2] * 4


@pytest.mark.parametrize("first", ["exits", "accelerate"])
def test_accelerates_hooks_in_both_orders(first, dit, batch):
    """They replace the model's `forward` and put an old one back, as offloading does at the end of every call."""
    from accelerate import hooks

    run = None
    if first == "exits":
        run = offramp.enable(dit, "time_schedule", **TABLE)
    hooks.add_hook_to_module(dit, hooks.ModelHook())
    run = run or offramp.enable(dit, "time_schedule", **TABLE)
    noise(dit, at(batch, 900))
    hooks.remove_hook_from_module(dit, recurse=True)
    noise(dit, at(batch, 900))
    assert run.stats.exits == {2: 8}


def test_layerwise_casting_in_both_orders(dit, batch):
    dit.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with offramp.enable(dit, "time_schedule", **TABLE) as run:
        one = noise(dit, at(batch, 900))
    assert run.stats.last_depths.tolist() == [2] * 4 and one.isfinite().all()


def test_casting_after_enabling(make, batch):
    model = make()
    run = offramp.enable(model, "time_schedule", **TABLE)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert noise(model, at(batch, 900)).isfinite().all() and run.stats.last_depths.tolist() == [2] * 4
    run.disable()
    assert noise(model, at(batch, 900)).isfinite().all()


@pytest.mark.parametrize("first", ["exits", "offload"])
@pytest.mark.parametrize(
    "level", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
def test_group_offloading_before_or_after_enabling(level, first, flux):
    """Offloaded first, skipped blocks are not even loaded; in both orders the image is the same."""
    model, given = flux
    full, cpu = noise(model, given), torch.device("cpu")
    with offramp.enable(model, "time_schedule", **TABLE):
        early = noise(model, given)
    if first == "offload":
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, **level)
    run = offramp.enable(model, "time_schedule", **TABLE)
    if first == "exits":
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, **level)
    for _ in range(2):
        assert torch.equal(noise(model, given), early) and run.stats.last_depths.tolist() == [2]
    run.disable()
    assert torch.equal(noise(model, given), full)


def test_compiled_blocks_are_skipped_from_outside(dit, batch):
    """torch.compile(block) first: the hook is on the wrapper, and no graph holds a decision."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with offramp.enable(dit, "time_schedule", **TABLE):
        wanted = [noise(dit, at(batch, level)) for level in (900, 500, 100)]
    for i, block in enumerate(dit.transformer_blocks):
        dit.transformer_blocks[i] = torch.compile(block, backend=backend)
    with offramp.enable(dit, "time_schedule", **TABLE) as run:
        for level, out in zip((900, 500, 100, 900), [*wanted, wanted[0]], strict=True):
            assert torch.allclose(noise(dit, at(batch, level)), out, atol=1e-5)
        compiled = len(graphs)
        noise(dit, at(batch, 500))
    assert run.stats.exits == {2: 8, 4: 8, 6: 4} and len(graphs) == compiled <= 2


def test_training_with_checkpoints_reaches_only_what_ran(sd3):
    """Gradient checkpointing hands arguments on by place, and runs each block twice."""
    model, given = sd3
    model.train()
    model.enable_gradient_checkpointing()
    with offramp.enable(model, "time_schedule", **TABLE):
        model(**given).sample.sum().backward()
    reached = [any(p.grad is not None for p in b.parameters()) for b in model.transformer_blocks]
    assert reached == [True, True, False, False, False, False]


def pipeline(dit):
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 8}
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = diffusers.AutoencoderKL(**blocks, **small)
    pipe = diffusers.DiTPipeline(transformer=dit, vae=vae.eval(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe):
    made = pipe([1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(1), output_type="np")
    return torch.from_numpy(made.images)


def test_the_pipeline_itself_can_be_enabled(dit):
    pipe = pipeline(dit)
    full = paint(pipe)
    with offramp.enable(pipe, "time_schedule") as run:
        early = paint(pipe)
    assert run.model is dit and RUN not in dit.__dict__
    assert run.stats.saved > 0.2 and not torch.equal(early, full) and torch.equal(paint(pipe), full)


def test_the_flag_of_a_component_goes_with_the_pipeline(dit, tmp_path):
    pipe = pipeline(dit)
    dit.register_to_config(early_exit={"policy": "time_schedule", "depths": [6, 2], "edges": [500.0]})
    with offramp.enable(pipe):
        early = paint(pipe)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    with offramp.enable(again) as run:
        assert torch.equal(paint(again), early)
    assert run.stats.exits == {2: 8, 6: 8}


def test_offloading_a_pipeline_keeps_exits(dit):
    """`enable_model_cpu_offload` takes its hooks off and on at the end of every call; here with the CPU as device."""
    from accelerate import cpu_offload_with_hook

    pipe = pipeline(dit)
    run = offramp.enable(pipe, "time_schedule", **TABLE)
    for _ in range(2):
        _, hook = cpu_offload_with_hook(dit, torch.device("cpu"))
        paint(pipe)
        hook.remove()
    assert run.stats.rows == 2 * 4 * 4 and run.stats.saved > 0.2


def test_pipelines_without_one_denoiser_are_refused(dit):
    pipe = pipeline(dit)
    pipe.transformer_2 = copy.deepcopy(dit)
    with pytest.raises(UnsupportedModel, match=r"two denoisers that take turns; say which"):
        offramp.enable(pipe, "time_schedule")
    del pipe.transformer_2
    pipe.transformer = None
    with pytest.raises(UnsupportedModel, match="has no denoiser under transformer, unet, prior"):
        offramp.enable(pipe, "time_schedule")


def compiled(way, model, backend):
    """Compile a DiT in one of the ways that there are; returns what is called."""
    blocks = model.transformer_blocks
    if way == "torch.compile(model)":
        return torch.compile(model, backend=backend)
    if way == "model.compile()":
        model.compile(backend=backend)
    for i, block in enumerate(blocks):
        if way == "block.compile()":
            block.compile(backend=backend)
        elif way == "torch.compile(block)":
            blocks[i] = torch.compile(block, backend=backend)
    return model


@pytest.mark.parametrize("first", ["exits", "compile"])
@pytest.mark.parametrize(
    "way",
    [
        *(pytest.param(whole, marks=pytest.mark.slow) for whole in ("torch.compile(model)", "model.compile()")),
        "torch.compile(block)",
        "block.compile()",
    ],
)
def test_compiled_before_or_after_enabling_it_says_the_same(way, first, dit, batch):
    levels, graphs = (900, 500, 100, 900), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    full = noise(dit, at(batch, 100))
    with offramp.enable(dit, "time_schedule", **TABLE):
        wanted = [noise(dit, at(batch, level)) for level in levels]
    if first == "exits":
        run = offramp.enable(dit, "time_schedule", **TABLE)
        called = compiled(way, dit, backend)
    else:
        called = compiled(way, dit, backend)
        run = offramp.enable(called, "time_schedule", **TABLE)  # also of what torch.compile returns
    for level, out in zip(levels, wanted, strict=True):
        assert torch.allclose(noise(called, at(batch, level)), out, atol=1e-5)
    assert run.stats.exits == {2: 8, 4: 4, 6: 4}
    made = len(graphs)
    for level in levels:
        noise(called, at(batch, level))
    assert 0 < made == len(graphs)  # nothing is compiled again where levels come back
    if way == "block.compile()" or (way, first) == ("torch.compile(block)", "compile"):
        assert made <= 2  # the hook is outside: blocks share their graph, whatever their place
    run.disable()
    assert torch.allclose(noise(called, at(batch, 100)), full, atol=1e-5)
    torch.compiler.reset()


def test_a_compiled_block_is_put_back_and_a_copy_of_it_leaves_early_too(dit, batch):
    for block in dit.transformer_blocks:
        block.compile(backend="eager")
    own = [block._compiled_call_impl for block in dit.transformer_blocks]
    with offramp.enable(dit, "time_schedule", **TABLE) as run:
        early = noise(dit, at(batch, 900))
        other = copy.deepcopy(dit)  # which torch does not compile
        assert torch.allclose(noise(other, at(batch, 900)), early, atol=1e-5) and run.stats.rows == 4
    assert [block._compiled_call_impl for block in dit.transformer_blocks] == own
    other.__dict__[RUN].disable()
    assert torch.allclose(noise(other, at(batch, 900)), noise(dit, at(batch, 900)), atol=1e-5)


def test_a_cache_inside_blocks_compiled_in_place_is_refused(flux):
    model, given = flux
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.compile(backend="eager")
    with offramp.enable(model, "time_schedule", **TABLE):
        model.enable_cache(CACHES["first_block"]())
        with model.cache_context("cond"), pytest.raises(BadArgument, match="FirstBlockCache is inside blocks that"):
            noise(model, given)
    model.disable_cache()


@pytest.mark.parametrize("first", ["exits", "offload"])
def test_a_pipeline_that_is_offloaded_before_or_after_enabling(first, dit):
    """From the CPU to the CPU: what is tried is the order of hooks, which are taken off and on after every call."""
    pipe = pipeline(dit)
    full = paint(pipe)
    with offramp.enable(pipe, "time_schedule", **TABLE):
        early = paint(pipe)
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    run = offramp.enable(pipe, "time_schedule", **TABLE)
    if first == "exits":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(paint(pipe), early)
    assert run.stats.rows == 2 * 4 * 4 and run.stats.saved > 0.2
    run.disable()
    assert torch.equal(paint(pipe), full)


@pytest.mark.parametrize("first", ["exits", "offload"])
def test_sequential_offloading_before_or_after_enabling(first, dit, monkeypatch):
    """`enable_sequential_cpu_offload` calls accelerate's `cpu_offload` on every component: its weights lie on no device
    and come leaf by leaf, here to the CPU, and those of skipped blocks do not come."""
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_module

    pipe, came, load = pipeline(dit), [], AlignDevicesHook.pre_forward
    full = paint(pipe)
    with offramp.enable(pipe, "time_schedule", **TABLE):
        early = paint(pipe)
    queries = {id(block.attn1.to_q): i for i, block in enumerate(dit.transformer_blocks)}

    def counted(hook, module, *args, **kwargs):
        came.extend([queries[id(module)]] if id(module) in queries else [])
        return load(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    if first == "offload":
        cpu_offload(dit, torch.device("cpu"))
    run = offramp.enable(pipe, "time_schedule", **TABLE)
    if first == "exits":
        cpu_offload(dit, torch.device("cpu"))
    assert all(p.is_meta for p in dit.parameters())
    for _ in range(2):
        assert torch.equal(paint(pipe), early)
    assert [came.count(i) for i in range(6)] == [8, 8, 6, 6, 4, 4] and run.stats.saved > 0.2
    run.disable()
    assert torch.equal(paint(pipe), full)
    remove_hook_from_module(dit, recurse=True)
    assert torch.equal(paint(pipe), full)


@pytest.mark.parametrize("first", ["exits", "lora"])
def test_an_adapter_that_is_loaded_before_or_after_enabling(first, sd3):
    from peft import LoraConfig

    model, given = sd3
    short = copy.deepcopy(model)
    short.transformer_blocks = short.transformer_blocks[:2]
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    if first == "exits":
        run = offramp.enable(model, "time_schedule", **TABLE)
        noise(model, given)
    torch.manual_seed(3)
    model.add_adapter(config, adapter_name="style")
    if first == "lora":
        run = offramp.enable(model, "time_schedule", **TABLE)
    early = noise(model, given)
    plain = noise(short, given)
    short.add_adapter(config, adapter_name="style")
    weights = {k: v for k, v in model.state_dict().items() if k in short.state_dict()}
    short.load_state_dict(weights)
    assert torch.equal(early, noise(short, given)) and not torch.equal(early, plain)
    model.disable_adapters()
    assert torch.equal(noise(model, given), plain) and run.stats.last_depths.tolist() == [2, 2]
    model.delete_adapters("style")
    assert torch.equal(noise(model, given), plain)
    run.disable()


def test_two_pipelines_that_share_a_transformer_take_turns(dit):
    one, two = pipeline(dit), pipeline(dit)
    two.scheduler = DPMSolverMultistepScheduler()
    full = paint(one), paint(two)
    run = offramp.enable(one, "time_schedule", **TABLE)
    early = paint(one)
    with pytest.raises(NotAttached, match="already enabled on this model; first: run.disable"):
        offramp.enable(two, "time_schedule", depths=(6, 3))
    assert run.enabled and torch.equal(paint(one), early)
    run.disable()
    with offramp.enable(two, "time_schedule", depths=(6, 3)) as run:
        assert not torch.equal(paint(two), full[1]) and set(run.stats.exits) == {3, 6}
    assert torch.equal(paint(one), full[0]) and torch.equal(paint(two), full[1])


def test_time_steps_of_every_token_count_with_their_highest():
    """Wan gives tokens of a first frame that is known the time step 0."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    times = torch.full((1, 32), 900)
    times[:, :16] = 0
    given = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 12)}
    short = copy.deepcopy(model)
    short.blocks = short.blocks[:2]
    wanted = noise(short, {**given, "timestep": times})
    with offramp.enable(model, "time_schedule", depths=(4, 2)) as run:
        assert torch.equal(noise(model, {**given, "timestep": times}), wanted)
        assert run.stats.last_depths.tolist() == [2]
        noise(model, {**given, "timestep": torch.zeros(1, 32)})
        assert run.stats.last_depths.tolist() == [4]


@pytest.mark.parametrize("first", ["exits", "casting"])
def test_casting_beside_output_layers_of_exits(first, dit, batch):
    exits = offramp.attach(dit, at=[2], head="output")
    casts = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    if first == "casting":
        dit.enable_layerwise_casting(**casts)
    run = offramp.enable(dit, "fixed", depth=2)
    if first == "exits":
        dit.enable_layerwise_casting(**casts)
    assert noise(dit, batch).isfinite().all() and run.stats.last_depths.tolist() == [2] * 4
    run.disable()
    assert noise(dit, batch).isfinite().all()
    exits.detach()
    assert noise(dit, batch).isfinite().all()
