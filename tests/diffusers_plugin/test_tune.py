"""Tuning runs only the depth that it trains, ends with a better early model, and measures what it says."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SD3Transformer2DModel,
)

import offramp
from offramp.enable import RUN
from offramp.errors import BadArgument, NotAttached
from offramp_diffusers import facts
from offramp_diffusers.facts import ModelFacts, noise_level
from offramp_diffusers.fit_schedule import fit_schedule
from offramp_diffusers.noising import noised, predict
from offramp_diffusers.policies.time_schedule import TimeSchedule, two_stage
from offramp_diffusers.tune import ADAPTER, errors, tune
from offramp_diffusers.tune_heads import tune_heads, tune_uncertainty


@pytest.fixture
def data():
    make = torch.Generator().manual_seed(0)
    return {"sample": torch.randn(32, 4, 8, 8, generator=make) * 0.1 + 1, "class_labels": torch.arange(32) % 4}


def test_only_the_depth_of_the_drawn_bin_runs(dit, data):
    ran = []
    for i, block in enumerate(dit.transformer_blocks):
        block.ff.register_forward_hook(lambda *_, i=i: ran.append(i))
    tune(dit, data, DDPMScheduler(), TimeSchedule((3,)), steps=2, batch_size=4, progress=False)
    assert ran == [0, 1, 2] * 2 and RUN not in dit.__dict__ and not dit.training


def test_rows_of_one_step_leave_where_their_levels_say(dit, data, monkeypatch):
    rows = []
    for block in dit.transformer_blocks:
        block.ff.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    tune(dit, data, DDPMScheduler(), TimeSchedule((6, 2)), steps=1, batch_size=16, progress=False)
    clean = rows[5]
    assert rows == [16, 16, clean, clean, clean, clean] and 0 < clean < 16


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_tuning_helps_the_depth_it_trains(dit, data, scheduler):
    before = errors(dit, data, scheduler, 2, depths=[2, 6], rows=32, progress=False)
    report = tune(dit, data, scheduler, TimeSchedule((2,)), steps=90, lr=3e-3, batch_size=16, ema=0.9, progress=False)
    after = errors(dit, data, scheduler, 2, depths=[2, 6], rows=32, progress=False)
    assert (after[:, 0] < 0.5 * before[:, 0]).all() and len(report.losses) == 90
    assert report.parameters == sum(p.numel() for p in dit.parameters())


def test_a_teacher_is_followed_with_all_its_blocks_and_stays_as_it_is(dit, data):
    teacher = copy.deepcopy(dit).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    given = {"hidden_states": data["sample"], "timestep": torch.arange(32) * 30, "class_labels": data["class_labels"]}

    def apart():
        with torch.no_grad(), offramp.enable(dit, TimeSchedule((2,))):
            return float((dit(**given).sample - teacher.eval()(**given).sample).square().mean())

    first = apart()
    teacher.train()
    with offramp.enable(teacher, TimeSchedule((1,))) as run:  # whatever is enabled on it, it is asked in full
        common = {"steps": 60, "lr": 3e-3, "batch_size": 16, "ema": 0.9, "progress": False}
        tune(dit, data, DDPMScheduler(), TimeSchedule((2,)), teacher=teacher, **common)
        assert run.stats.rows == 0
    assert teacher.training and apart() < 0.2 * first
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_answers_are_asked_for_once_and_learned_again_and_again(dit, data):
    teacher, asked = copy.deepcopy(dit).train(), []
    teacher.register_forward_hook(lambda module, given, output: asked.append(len(output[0])))
    common = {"steps": 40, "lr": 3e-3, "batch_size": 16, "ema": 0.0, "progress": False}
    report = tune(dit, data, DDPMScheduler(), TimeSchedule((2,)), teacher=teacher, answers=24, **common)
    assert sum(asked) == 24 and len(report.losses) == 40 and report.losses[-1] < 0.2 * report.losses[0]
    for wrong in ({"answers": 24}, {"answers": 0, "teacher": teacher}):
        with pytest.raises(BadArgument, match="answers=.* is how many noised rows the teacher answers"):
            tune(dit, data, DDPMScheduler(), TimeSchedule((2,)), **wrong, **common)


def test_who_cannot_teach_is_refused(dit, data, marks):
    before = marks(dit)
    for teacher, what in ((dit, "the model itself, which changes"), (torch.nn.Linear(2, 2), "a Linear")):
        with pytest.raises(BadArgument, match=f"teacher= is {what}; give another DiTTransformer2DModel"):
            tune(dit, data, DDPMScheduler(), TimeSchedule((2,)), teacher=teacher, steps=1, progress=False)
    assert marks(dit) == before


@pytest.mark.parametrize("told", [{}, {"full": 1.0}, {"full": 1.0, "rising": True}])
@pytest.mark.parametrize("count", [1000, 50])
def test_a_flow_model_is_told_the_level_that_the_image_was_mixed_at(dit, monkeypatch, told, count):
    kind = ModelFacts(("transformer_blocks",), **told)
    monkeypatch.setitem(facts.MODELS, "DiTTransformer2DModel", kind)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=count)
    black = {"sample": torch.zeros(64, 4, 8, 8)}  # what is mixed with it is the noise times its share
    between, draw = (0.0, 1000.0), torch.Generator().manual_seed(0)
    given, wanted, levels = noised(black, torch.arange(64), scheduler, between, draw, dit)
    share = (given["hidden_states"] / wanted).flatten(1).mean(1)
    assert torch.allclose(levels, 1000 * share, atol=1e-2)
    assert torch.allclose(torch.tensor(noise_level(kind, {}, given["timestep"])), 1000 * share, atol=1e-2)
    sigmas = scheduler.sigmas.sort().values
    assert all((sigmas - s).abs().min() < 1e-5 for s in share)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_the_noise_level_goes_where_the_data_is(dit, scheduler):
    data, draw = {"sample": torch.zeros(4, 4, 8, 8, device="meta")}, torch.Generator().manual_seed(0)
    given, _, _ = noised(data, torch.arange(4), scheduler, (0.0, 1000.0), draw, dit)
    assert given["timestep"].device == given["hidden_states"].device


def test_every_depth_is_drawn_without_a_schedule_and_the_run_is_repeatable(make, data):
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make()
        losses.append(tune(model, data, DDPMScheduler(), steps=4, batch_size=4, ema=0, progress=False).losses)
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


def test_only_the_adapter_is_trained_with_lora(dit, data):
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    report = tune(dit, data, DDPMScheduler(), two_stage(2, 6), steps=3, lr=1e-2, lora=2, batch_size=4, progress=False)
    after = dit.state_dict()
    assert report.parameters == sum(p.numel() for n, p in dit.named_parameters() if ADAPTER in n)
    queries = {k.replace(".to_q.", ".to_q.base_layer."): v for k, v in before.items() if "to_q" in k}
    assert queries and all(torch.equal(after[k], v) for k, v in queries.items())
    assert any(v.abs().sum() > 0 for k, v in after.items() if "lora_B" in k)


def test_measured_errors_are_those_of_the_depth(dit, data):
    found = errors(dit, data, DDPMScheduler(), 3, rows=8, progress=False)
    assert found.shape == (3, 6) and found.isfinite().all()
    again = errors(dit, data, DDPMScheduler(), 3, depths=[2], rows=8, progress=False)
    assert torch.equal(found[:, 1:2], again)
    for level in range(3):
        draw = torch.Generator().manual_seed(level)
        picked = torch.randint(32, (8,), generator=draw)
        given, wanted, _ = noised(data, picked, DDPMScheduler(), (1000 * level / 3, 1000 * (level + 1) / 3), draw, dit)
        with offramp.enable(dit, TimeSchedule((2,))), torch.no_grad():
            said = predict(dit, given, wanted)
        off = (said.double() - wanted.double()).square().mean()
        assert float(found[level, 1]) == pytest.approx(float(off), rel=1e-6)
    plan = fit_schedule(found, 0.5)
    with offramp.enable(dit, plan) as run, torch.no_grad():
        dit(torch.randn(2, 4, 8, 8), timestep=torch.tensor([900, 900]), class_labels=torch.tensor([0, 1]))
    assert run.stats.last_depths.tolist() == [plan.depths[2]] * 2


def test_each_input_runs_through_the_blocks_once_to_measure_every_depth(dit, data):
    ran = []
    for i, block in enumerate(dit.transformer_blocks):
        block.ff.register_forward_hook(lambda *_, i=i: ran.append(i))
    errors(dit, data, DDPMScheduler(), 2, rows=4, progress=False)
    assert ran == list(range(6)) * 2
    with pytest.raises(BadArgument, match="7 blocks are more than the 6"):
        errors(dit, data, DDPMScheduler(), 2, depths=[7], rows=4, progress=False)


BAD_DATA = [
    ({}, "data must be"),
    ({"sample": torch.zeros(0, 4, 8, 8)}, "data must be"),
    ({"sample": torch.ones(8, 4, 8, 8), "class_labels": torch.zeros(3)}, "class_labels is no tensor of as many rows"),
]


def test_bad_input(dit, data):
    plan = TimeSchedule((2,))
    for wrong, match in BAD_DATA:
        with pytest.raises(BadArgument, match=match):
            tune(dit, wrong, DDPMScheduler(), plan, steps=1, progress=False)
    with pytest.raises(BadArgument, match="steps=0 must be at least 1"):
        tune(dit, data, DDPMScheduler(), plan, steps=0, progress=False)
    with pytest.raises(BadArgument, match="must be a time_schedule, or None"):
        tune(dit, data, DDPMScheduler(), offramp.policy("never"), steps=1, progress=False)
    with offramp.enable(dit, plan), pytest.raises(NotAttached, match=r"run.disable\(\)"):
        tune(dit, data, DDPMScheduler(), plan, steps=1, progress=False)


@pytest.mark.parametrize(("way", "head"), [(tune_heads, "bottleneck"), (tune_uncertainty, "uncertainty")])
def test_heads_are_not_trained_on_what_is_no_data(dit, data, way, head):
    offramp.attach(dit, at=[2], head=head)
    for wrong, match in BAD_DATA:
        with pytest.raises(BadArgument, match=match):
            way(dit, wrong, DDPMScheduler(), steps=1, progress=False)
    with pytest.raises(BadArgument, match="steps=0 must be at least 1"):
        way(dit, data, DDPMScheduler(), steps=0, progress=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"schedule": TimeSchedule((7,))}, "7 blocks are more than the 6 of this model"),
        ({"schedule": offramp.policy("fixed", depth=2), "lora": 2}, "must be a time_schedule, or None"),
        ({"schedule": TimeSchedule((7,)), "lora": 2}, "7 blocks are more than the 6 of this model"),
        ({"lora": 0}, "lora=0 is the rank"),
        ({"lora": 2, "ema": 1.0}, "ema=1.0 must be a decay"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(dit, data, marks, options, match):
    before, flags = marks(dit), [p.requires_grad for p in dit.parameters()]
    with pytest.raises(BadArgument, match=match):
        tune(dit, data, DDPMScheduler(), **{"steps": 1, "batch_size": 2, "progress": False, **options})
    assert marks(dit) == before and [p.requires_grad for p in dit.parameters()] == flags


def test_no_place_for_an_adapter_is_a_bad_argument(dit, data, marks):
    for block in dit.transformer_blocks:
        attention = block.attn1
        attention.q, attention.k, attention.v, attention.out = (
            attention.to_q, attention.to_k, attention.to_v, attention.to_out
        )  # fmt: skip
        del attention.to_q, attention.to_k, attention.to_v, attention.to_out
    before = marks(dit)
    with pytest.raises(BadArgument, match="lora=2 trains attention projections called to_q, to_k"):
        tune(dit, data, DDPMScheduler(), TimeSchedule((2,)), steps=1, lora=2, progress=False)
    assert marks(dit) == before and all(p.requires_grad for p in dit.parameters())


def test_a_loss_of_another_kind_is_refused(dit, data):
    with pytest.raises(BadArgument, match=r"no method at\(said, wanted, level\); write loss='ase'"):
        tune(dit, data, DDPMScheduler(), loss="uncertainty_layerwise", steps=1, progress=False)
    offramp.attach(dit, at=[2], head="uncertainty")
    wanted = r"no method estimated_at\(said, wanted, estimate\); write loss='uncertainty_layerwise'"
    with pytest.raises(BadArgument, match=wanted):
        tune_uncertainty(dit, data, DDPMScheduler(), loss="ase", steps=1, progress=False)


def test_what_the_scheduler_predicts_is_asked_before_anything_changes(dit, data, marks):
    before, flags = marks(dit), [p.requires_grad for p in dit.parameters()]
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="score")
    strangers = (scheduler, "predicts 'score'; known: epsilon"), (EDMEulerScheduler(), "has no alphas_cumprod")
    for strange, match in strangers:
        with pytest.raises(BadArgument, match=match):
            tune(dit, data, strange, steps=1, lora=2, progress=False)
    with pytest.raises(BadArgument, match="takes no label; its arguments: hidden_states, timestep"):
        tune(dit, {**data, "label": torch.zeros(32)}, DDPMScheduler(), steps=1, lora=2, progress=False)
    assert marks(dit) == before and [p.requires_grad for p in dit.parameters()] == flags


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "solver", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_every_solver_trains_on_what_its_pipeline_shows_the_model(solver, kind, dit):
    """Euler and Heun mix in more noise and scale it down again before the model sees it."""
    scheduler = solver(prediction_type=kind)
    scheduler.set_timesteps(1000)
    draw = torch.Generator().manual_seed(0)
    data = {"sample": torch.randn(8, 4, 8, 8)}
    given, wanted, _ = noised(data, torch.arange(8), scheduler, (1.0, 1000.0), draw, dit)
    seed = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = DDPMScheduler(beta_start=scheduler.config.beta_start, beta_end=scheduler.config.beta_end)
    for row, t in enumerate(given["timestep"]):
        one = plain.add_noise(data["sample"][row], seed[row], t)
        if hasattr(scheduler, "sigmas") and solver in (EulerDiscreteScheduler, HeunDiscreteScheduler):
            scheduler._step_index = scheduler._begin_index = None
            mixed = scheduler.add_noise(data["sample"][row : row + 1], seed[row : row + 1], t.reshape(1).float())
            one = scheduler.scale_model_input(mixed, t.float())[0]
        assert torch.allclose(given["hidden_states"][row], one, atol=1e-4), int(t)
        target = {"epsilon": seed[row], "sample": data["sample"][row]}.get(kind)
        target = plain.get_velocity(data["sample"][row], seed[row], t) if target is None else target
        assert torch.allclose(wanted[row], target, atol=1e-5)


def test_a_second_training_goes_on_with_the_adapter_of_the_first(dit, data):
    options = {"steps": 3, "lr": 1e-2, "batch_size": 4, "progress": False, "ema": 0}
    tune(dit, data, DDPMScheduler(), two_stage(2, 6), lora=2, **options)
    first = {k: v.clone() for k, v in dit.state_dict().items() if ADAPTER in k}
    with pytest.raises(BadArgument, match="an adapter 'early_depths' of rank 2 already; go on with lora=2"):
        tune(dit, data, DDPMScheduler(), lora=4, **options)
    tune(dit, data, DDPMScheduler(), two_stage(2, 6), lora=2, **{**options, "lr": 1e-6})
    assert all(torch.allclose(v, first[k], atol=1e-4) for k, v in dit.state_dict().items() if k in first)


def test_diffusers_knows_the_adapter_and_saves_it(data, tmp_path):
    small = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "pos_embed_max_size": 8}
    model = SD3Transformer2DModel(**small, **heads, joint_attention_dim=12, pooled_projection_dim=10)
    given = {"encoder_hidden_states": torch.randn(32, 5, 12), "pooled_projections": torch.randn(32, 10)}
    latents = {"sample": data["sample"], **given}
    scheduler = FlowMatchEulerDiscreteScheduler()
    tune(model, latents, scheduler, steps=3, lr=1e-2, lora=2, batch_size=4, ema=0, progress=False)
    batch = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([900.0, 10.0])}
    batch |= {k: v[:2] for k, v in given.items()}
    with torch.no_grad():
        tuned = model(**batch).sample
        model.disable_adapters()
        plain = model(**batch).sample
        model.enable_adapters()
        model.save_lora_adapter(tmp_path, adapter_name=ADAPTER)
        model.delete_adapters(ADAPTER)
        assert torch.equal(model(**batch).sample, plain) and not torch.equal(tuned, plain)
        file = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": None}
        model.load_lora_adapter(tmp_path, adapter_name="again", **file)
        assert torch.allclose(model(**batch).sample, tuned, atol=1e-5)
