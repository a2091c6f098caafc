"""Images leave a timm model inside one forward: real savings, the right rows, and an exact way back."""

import copy
from dataclasses import dataclass

import pytest
import timm
import torch
from timm.models import beit, deit, eva, mlp_mixer

import offramp
from offramp._plugins import adapt
from offramp._registry import lookup
from offramp.errors import BadArgument
from offramp.gating import gate_of
from offramp.policy import ExitPolicy, SchedulePolicy, ThresholdPolicy
from offramp.testing.backbones import check_backbone
from offramp.testing.heads import check_head

AT = (2, 4, 5)


@dataclass(frozen=True)
class Plan(ExitPolicy):
    """Row i leaves at the exit with index plan[i]; no such exit: it runs to the end."""

    plan: tuple

    def start(self, batch, device):
        return {"plan": torch.tensor(self.plan[:batch])}

    def step(self, state, seen):
        return state["plan"] == seen.index, state


def calls(model):
    """Count the rows of every call of every block's own work."""
    seen = []
    hooks = [b.mlp.register_forward_hook(lambda m, a, out: seen.append(len(out))) for b in model.blocks]
    return seen, lambda: [h.remove() for h in hooks]


SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_classes": 10}
KINDS = {
    "token": (lambda make: make(), "token"),
    "norm after pooling": (lambda make: make(fc_norm=True), "token"),
    "avg": (lambda make: make(global_pool="avg"), "pooled"),
    "avg of normed": (lambda make: make(global_pool="avg", fc_norm=False), "pooled"),
    "max": (lambda make: make(global_pool="max"), "pooled"),
    "attention pool": (lambda make: make(global_pool="map", class_token=False), "pooled"),
    "registers": (lambda make: make(reg_tokens=2, pre_norm=True), "token"),
    "parallel": (lambda make: make(block_fn=timm.models.vision_transformer.ParallelScalingBlock), "token"),
    "beit": (lambda make: beit.Beit(**SIZE, depth=4, num_heads=3, use_shared_rel_pos_bias=True), "mean"),
    "eva": (lambda make: eva.Eva(**SIZE, depth=4, num_heads=3, use_rot_pos_emb=True), "pooled"),
    "mixer": (lambda make: mlp_mixer.MlpMixer(**SIZE, num_blocks=4), "mean"),
}


@pytest.fixture(params=KINDS)
def kind(request, make):
    build, reading = KINDS[request.param]
    model = build(make)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval(), reading


@torch.no_grad()
def test_the_readout_is_the_models_own(kind, x):
    model, reading = kind
    backbone = adapt(model)
    assert backbone.reading == reading
    check_backbone(backbone, x)
    seen = backbone.observe(x, [2])
    assert torch.equal(backbone.context().readout(seen.final), model(x))
    with offramp.attach(model, [2]) as exits:
        assert torch.equal(exits[2](seen.hidden[0]), backbone.context().readout(seen.hidden[0]))


@torch.no_grad()
def test_fixed_is_the_truncated_model(kind, x):
    model, _ = kind
    short = copy.deepcopy(model)
    short.blocks = torch.nn.Sequential(*short.blocks[:2])
    offramp.attach(model, [2, 3])
    with offramp.enable(model, "fixed", depth=2) as run:
        got = model(x)
    assert torch.equal(got, short(x)) and run.stats.exits == {2: 6}


@pytest.mark.parametrize("head", ["tied", "linear", "translator"])
def test_heads_keep_their_contract(head, model):
    check_head(head, model)


@torch.no_grad()
def test_fixed_saves_real_blocks(model, x):
    full = model(x)
    offramp.attach(model, at=[2, 0.5])
    with offramp.enable(model, "fixed", depth=3) as run:
        seen, undo = calls(model)
        out = model(x)
        undo()
    assert seen == [6, 6, 6]
    stats = run.stats
    assert (stats.blocks_run, stats.blocks_full, stats.rows) == (18, 36, 6)
    assert stats.saved == 0.5 and stats.depth_mean == 3 and stats.last_depths.tolist() == [3] * 6
    assert out.shape == full.shape and not torch.equal(out, full) and torch.equal(model(x), full)


@torch.no_grad()
def test_rows_leave_one_by_one_and_come_back_in_order(model, x):
    full, plan = model(x), (0, 9, 1, 2, 0, 1)
    exits = offramp.attach(model, AT)
    states = exits.backbone.observe(x, AT).hidden
    with offramp.enable(model, Plan(plan)) as run:
        seen, undo = calls(model)
        out = model(x)
        undo()
    assert seen == [6, 6, 4, 4, 2, 1]
    assert run.stats.blocks_run == sum(seen) and run.stats.last_depths.tolist() == [2, 6, 4, 5, 2, 4]
    for row, index in enumerate(plan):
        wanted = full[row] if index == 9 else exits[AT[index]](states[index])[row]
        assert torch.allclose(out[row], wanted, atol=1e-5), row


def examples():
    """Every policy whose rows can be decided without a position, at a setting at which some rows leave."""
    for name in offramp.names(offramp.ExitPolicy):
        policy = lookup(offramp.ExitPolicy, name).example(AT, 10)
        if isinstance(policy, SchedulePolicy) or name == "uncertainty":  # for models that generate, and denoisers
            continue
        if isinstance(policy, ThresholdPolicy) and name not in ("saturation", "energy", "agreement"):
            policy = type(policy)(threshold=2.0 if name == "entropy" else 0.3)
        yield pytest.param(policy, id=name)


@pytest.mark.parametrize("policy", examples())
@torch.no_grad()
def test_a_batch_decides_as_its_rows_alone_do(policy, model, x):
    # a readout like any, with a gate inside it, and the gate beside the exits that the policy reads
    gate = next(filter(None, map(gate_of, policy.statistics())), None)
    exits = offramp.attach(model, AT, head="speculative", gate=gate)
    for depth in exits:
        torch.nn.init.normal_(exits[depth].exit_gate[-1].weight)
    if gate is not None:
        torch.nn.init.normal_(exits.gate_module.get_parameter(type(exits.gate_module).zero), std=0.01)
    run = offramp.enable(model, policy)
    if policy.config()["policy"] == "decaying":
        with pytest.raises(BadArgument, match="needs the position"):
            model(x)
        return
    out, depths = model(x), run.stats.last_depths
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(model(x[order]), out[order], atol=1e-5)
    assert torch.equal(run.stats.last_depths, depths[order])
    for i in range(len(x)):
        assert torch.allclose(model(x[i : i + 1]), out[i : i + 1], atol=1e-5)
        assert run.stats.last_depths.item() == depths[i]
    assert run.stats.rows == 18 and sum(run.stats.exits.values()) == 18
    assert run.stats.blocks_run == sum(d * n for d, n in run.stats.exits.items())
    exits.detach()


@torch.no_grad()
def test_undo_is_exact(model, x, marks):
    before, full, keys = marks(model), model(x), list(model.state_dict())
    exits = offramp.attach(model, AT)
    assert [k for k in model.state_dict() if not k.startswith("exits.")] == keys
    run = offramp.enable(model, "confidence", threshold=0.1)
    assert not torch.equal(model(x), full)
    run.disable()
    assert torch.equal(model(x), full)
    exits.detach()
    assert torch.equal(model(x), full) and list(model.state_dict()) == keys and marks(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_what_a_forward_raises_leaves_no_trace(error, model, x, marks):
    full, before = model(x), marks(model)

    def fail(*_):
        raise error("inside block 4")

    offramp.attach(model, AT)
    with offramp.enable(model, Plan((0, 9, 1, 2, 0, 1))) as run:
        wanted = model(x)
        first = run.stats.to_dict()
        broken = model.blocks[4].register_forward_hook(fail)
        with pytest.raises(error, match="inside block 4"):
            model(x)
        broken.remove()
        assert run.stats.to_dict() == first
        assert torch.equal(model.forward_head(model.forward_features(x)), full)
        assert torch.equal(model(x), wanted) and torch.equal(model(x[:3])[:1], model(x[:3])[:1])
    run.exits.detach()
    assert torch.equal(model(x), full) and marks(model) == before


@torch.no_grad()
def test_parts_called_on_their_own_run_in_full(model, x):
    full = model(x)
    exits = offramp.attach(model, AT)
    hidden = exits.backbone.observe(x, [2]).hidden[0]
    alone = exits[2](hidden)
    with offramp.enable(model, "fixed", depth=2) as run:
        early = model(x)
        assert torch.equal(model.forward_head(model.forward_features(x)), full)
        assert torch.equal(exits[2](hidden), alone)  # a tied head calls the model's own classifier
        seen = exits.backbone.observe(x, [2])
        assert torch.equal(seen.hidden[0], hidden) and torch.equal(model.head(model.norm(seen.final)), full)
        assert torch.equal(model(x), early) and run.stats.rows == 12


@torch.no_grad()
def test_deep_copies_are_independent(model, x):
    full = model(x)
    offramp.attach(model, AT)
    run = offramp.enable(model, "fixed", depth=2)
    early = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), early) and run.stats.rows == 6
    theirs = other.__dict__["_offramp_run"]
    assert theirs is not run and theirs.enabled and theirs.stats.rows == 12
    theirs.disable()
    assert torch.equal(other(x), full) and torch.equal(model(x), early) and run.enabled
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.zero_()
    assert torch.equal(model(x), early)
    run.disable()
    assert torch.equal(model(x), full) and not torch.equal(other(x), full)


@torch.no_grad()
def test_odd_batches(model, x):
    offramp.attach(model, AT)
    with offramp.enable(model, "confidence", threshold=0.3) as run:
        assert model(x[:0]).shape == (0, 10) and run.stats.rows == 0 and run.stats.last_depths.tolist() == []
        bad = x.clone()
        bad[2] = float("nan")
        out = model(bad)
        assert out[2].isnan().all() and out[[0, 1, 3, 4, 5]].isfinite().all()
        assert run.stats.last_depths[2] == 6 and run.stats.nonfinite == 3


def test_gradients_reach_the_blocks_that_ran(model, x):
    offramp.attach(model, AT)
    with offramp.enable(model, Plan((0, 0, 1, 1, 0, 1))):
        model(x).sum().backward()
    ran = [any(p.grad is not None and p.grad.any() for p in b.parameters()) for b in model.blocks]
    assert ran == [True] * 4 + [False] * 2


@torch.no_grad()
def test_two_classifiers_are_read_as_one(x):
    model = deit.VisionTransformerDistilled(**SIZE, depth=3, num_heads=3).eval()
    with offramp.attach(model, [1], "pooled_linear") as exits:
        seen = exits.observe(x)
        assert torch.allclose(exits.backbone.context().readout(seen.final), model(x), atol=1e-6)
        assert exits.backbone.taps()[0].prefix == 2


def train(model, x, y, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.slow
def test_real_digits_end_to_end():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    x = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    x, y, test_x, test_y = x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]
    small = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 2}
    model = train(timm.models.vision_transformer.VisionTransformer(**small, depth=6, num_classes=10), x, y, 250)
    with torch.no_grad():
        right = (model(test_x).argmax(-1) == test_y).float().mean().item()
    offramp.attach(model, at=[2, 3, 4], head="linear")
    report = offramp.fit(model, [(x, y)], loss="labels", steps=150, lr=3e-3, rows=256, progress=False)
    assert all(report.agreement[d] > report.before[d] for d in (2, 3))
    trace = offramp.record(model, {"x": test_x, "y": test_y}, batch_size=256)
    outcome = offramp.simulate(trace, "confidence", threshold=0.9)
    with offramp.enable(model, "confidence", threshold=0.9) as run, torch.no_grad():
        early = (model(test_x).argmax(-1) == test_y).float().mean().item()
    assert torch.equal(run.stats.last_depths, outcome.depths) and abs(outcome.accuracy - early) < 1e-6
    assert right > 0.9 and early > right - 0.03 and run.stats.saved > 0.2
