"""Dynamic Perceiver: latents go along beside the model, exits read them, and images leave both."""

import copy

import pytest
import timm
import torch

import offramp
from offramp._registry import lookup
from offramp.errors import BadArgument, DamagedFile, UnsupportedModel
from offramp.gating import gate_of
from offramp.policy import ExitPolicy, SchedulePolicy
from offramp_vision import perceiver

AT = (3, 4)
SMALL = {"latents": 16, "depths": [1, 1, 1, 1]}


def shaken(module):
    """Give every weight its own random value: what a branch adds starts at zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = timm.models.resnet
    return made.ResNet(made.BasicBlock, (2, 1, 1, 1), channels=(16, 16, 24, 32), num_classes=5).eval()


@pytest.fixture
def x():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exits(model):
    found = perceiver.attach(model, **SMALL)
    shaken(found.modules)
    return found


def halfway(exits, x):
    """A confidence that half of the images have at the first exit."""
    return exits[AT[0]](exits.observe(x).hidden[0]).softmax(-1).amax(-1).sort().values[2:4].mean().item()


@torch.no_grad()
def test_it_starts_as_the_model_was_and_comes_off_exactly(model, x, marks):
    full, keys, before = model(x), list(model.state_dict()), marks(model)
    exits = perceiver.attach(model, **SMALL)
    assert exits.at == AT and torch.equal(model(x), full)
    shaken(exits.modules)
    assert not torch.allclose(model(x), full, atol=1e-3)  # latents write into the maps and into the answer
    exits.detach()
    assert torch.equal(model(x), full) and list(model.state_dict()) == keys and marks(model) == before


@torch.no_grad()
def test_images_leave_the_model_and_the_branch(model, exits, x):
    full, seen = model(x), exits.observe(x)
    assert torch.allclose(exits.backbone.context().readout(seen.final), full, atol=1e-5)
    said = [exits[d](h) for d, h in zip(AT, seen.hidden, strict=True)] + [full]
    middle, ran, latents = halfway(exits, x), [], []
    model.layer4[0].conv1.register_forward_hook(lambda m, a, out: ran.append(len(out)))
    exits.backbone.branch.think[-1].register_forward_hook(lambda m, a, out: latents.append(len(out)))
    with offramp.enable(model, "confidence", threshold=middle) as run:
        out = model(x)
    depths = run.stats.last_depths
    assert (depths == 3).sum() == 3 and latents == [3] and sum(ran) == (depths == 5).sum() > 0
    assert run.stats.blocks_run == depths.sum()
    for row, depth in enumerate(depths.tolist()):
        assert torch.allclose(out[row], said[[*AT, 5].index(depth)][row], atol=1e-5), row
    with offramp.enable(model, "never"):
        assert torch.equal(model(x), full)
    with offramp.enable(model, "fixed", depth=4):
        assert torch.allclose(model(x), said[1], atol=1e-5)


@torch.no_grad()
def test_an_exit_does_not_look_at_what_has_not_run(model, exits, x):
    wanted = [h.clone() for h in exits.observe(x).hidden]
    shaken(model.layer4)
    assert all(torch.equal(a, b) for a, b in zip(exits.observe(x).hidden, wanted, strict=True))
    shaken(model.layer3)
    found = exits.observe(x).hidden
    assert torch.equal(found[0], wanted[0]) and not torch.equal(found[1], wanted[1])


@torch.no_grad()
def test_an_exit_hears_what_the_exit_before_it_says(model, exits, x):
    one, two = exits.observe(x).hidden
    assert torch.equal(two[:, exits[4].width :], exits[3](one))
    exits[3].proj.bias.add_(torch.arange(5.0))
    assert not torch.allclose(exits[4](exits.observe(x).hidden[1]), exits[4](two), atol=1e-4)


def policies():
    """Every policy over predictions, not those that look at states, gates or positions."""
    for name in offramp.names(ExitPolicy):
        policy = lookup(ExitPolicy, name).example(AT, 5)
        asked = policy.statistics()
        if not isinstance(policy, SchedulePolicy) and name not in ("uncertainty", "decaying"):
            if not any(a in ("cosine", "gate") or gate_of(a) for a in asked):
                yield name, policy


@pytest.mark.parametrize(("name", "policy"), policies())
@torch.no_grad()
def test_a_batch_decides_as_its_images_alone_do(name, policy, model, exits, x):
    run = offramp.enable(model, policy)
    out, depths = model(x), run.stats.last_depths
    for i in range(len(x)):
        assert torch.allclose(model(x[i : i + 1]), out[i : i + 1], atol=1e-4), i
        assert run.stats.last_depths.item() == depths[i]


def test_what_is_saved_comes_back(model, exits, x, tmp_path):
    with torch.no_grad():
        wanted = model(x)
        exits.save(tmp_path)
        exits.detach()
        found = offramp.load(model, tmp_path)
        assert found.at == AT and torch.equal(model(x), wanted)
        found.detach()
    other = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (2, 1, 1, 1), channels=(16, 16, 32, 32))
    with pytest.raises(DamagedFile, match="classes 5, this model has 1000"):
        offramp.load(other, tmp_path)
    assert not hasattr(other, "exits")


@torch.no_grad()
def test_deep_copies_have_a_branch_of_their_own(model, exits, x):
    with offramp.enable(model, "confidence", threshold=halfway(exits, x)):
        wanted = model(x)
        other = copy.deepcopy(model)
        shaken(other)
        assert not torch.allclose(other(x), wanted, atol=1e-3) and torch.equal(model(x), wanted)
        other.__dict__["_offramp_run"].disable()
        other.__dict__["_offramp_exits"].detach()
        assert torch.equal(model(x), wanted) and not hasattr(other, "exits")


def test_a_forward_with_gradients_that_ends_early_leaves_nothing_behind(model, exits, x):
    with offramp.enable(model, "fixed", depth=3):
        model(x).sum().backward()
        assert exits.backbone.branch.flow is None and exits.backbone.branch.start.grad.any()
    assert all(p.grad is None for p in model.layer3.parameters())
    model.forward_features(x)  # the classifier is not called: latents wait for it
    assert copy.deepcopy(model).exits["branch"].flow is None and exits.backbone.branch.flow is not None


@pytest.mark.parametrize("backbone", [False, True])
def test_training_moves_the_branch_and_the_model_only_where_asked(backbone, model, x):
    exits = perceiver.attach(model, **SMALL)
    data = {"x": x.repeat(4, 1, 1, 1), "labels": torch.arange(6).repeat(4) % 5}
    own = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("exits.")}
    branch = {k: v.clone() for k, v in exits.modules.state_dict().items()}
    report = offramp.fit(model, data, loss="perceiver", steps=20, lr=3e-3, backbone=backbone, progress=False)
    assert report.losses[-1] < report.losses[0] and not model.training
    assert all(torch.equal(model.state_dict()[k], v) for k, v in own.items()) is not backbone
    still = [k for k, v in exits.modules.state_dict().items() if torch.equal(v, branch[k])]
    assert not still, still


@torch.no_grad()
def test_recorded_costs_count_the_latents(model, exits, x):
    data = {"x": x, "labels": torch.arange(6) % 5}
    with_branch = offramp.record(model, data, costs="flops").costs
    exits.detach()
    with offramp.attach(model, AT, "pooled_linear"):
        plain = offramp.record(model, data, costs="flops").costs
    assert (with_branch > plain).all()


@torch.no_grad()
def test_live_is_as_simulated(model, exits, x):
    trace = offramp.record(model, {"x": x, "labels": torch.arange(6) % 5}, batch_size=6)
    told = offramp.simulate(trace, "confidence", threshold=halfway(exits, x))
    with offramp.enable(model, "confidence", threshold=halfway(exits, x)) as run:
        answers = model(x).argmax(-1)
    assert run.stats.last_depths.tolist() == told.depths.tolist() and answers.tolist() == told.labels.tolist()


@torch.no_grad()
def test_odd_batches(model, exits, x):
    with offramp.enable(model, "confidence", threshold=halfway(exits, x)) as run:
        assert model(x[:0]).shape == (0, 5) and len(exits.observe(x[:0]).hidden[1]) == 0
        bad = x.clone()
        bad[1] = float("nan")
        out = model(bad)
        assert out[1].isnan().all() and out[[0, 2, 3, 4, 5]].isfinite().all() and run.stats.last_depths[1] == 5
        assert run.stats.nonfinite == 2
        wanted = model(x)
        with pytest.raises(RuntimeError, match="channels"):
            model(x[:, :1])
        assert torch.equal(model(x), wanted)
        assert model(torch.randn(6, 3, 48, 64)).shape == (6, 5)  # maps are pooled to the places that latents know


@torch.no_grad()
def test_conditions(model, exits, x):
    with offramp.enable(model, "confidence", threshold=halfway(exits, x)) as run:
        wanted, depths = model(x), run.stats.last_depths
        model.to(memory_format=torch.channels_last)
        assert torch.allclose(model(x.to(memory_format=torch.channels_last)), wanted, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(model(x).float(), wanted, atol=0.2)
        model.double()
        assert torch.allclose(model(x.double()).float(), wanted, atol=1e-4)
        assert torch.equal(run.stats.last_depths, depths)


@pytest.mark.parametrize(
    "name", ["convnext_atto", "regnety_002", "mobilenetv3_small_050", "densenet121", "swin_tiny_patch4_window7_224"]
)
@torch.no_grad()
def test_stages_are_found_by_their_maps(name):
    options = {"img_size": 64} if name.startswith("swin") else {}
    model = timm.create_model(name, num_classes=3, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    full = model(x)
    with perceiver.attach(model, 8, depths=[0, 0, 0, 0]) as exits:
        assert torch.equal(model(x), full)
        grids = [exits.backbone.taps()[d - 1].grid for d in exits.at]
        assert len(set(grids)) == 2 and len(exits.backbone.branch.ends) == 4
        with offramp.enable(model, "fixed", depth=exits.at[0]) as run:
            model(x)
        assert run.stats.exits == {exits.at[0]: 2}
    assert torch.equal(model(x), full)


def test_what_it_refuses(model, x, marks):
    before = marks(model)
    for options, message in (
        ({"latents": 12}, "latents=12 must be a number that 4 stages can halve: divisible by 8"),
        ({"depths": [1, 1]}, "a number of blocks for each of 4 stages"),
        ({"places": 0}, "places=0"),
        ({"at": [1, 3]}, r"no stage ends at \[1\].*here \[2, 3, 4\]"),
    ):
        with pytest.raises(BadArgument, match=message):
            perceiver.attach(model, **options)
        assert marks(model) == before
    with pytest.raises(UnsupportedModel, match="no stages of smaller and smaller maps"):
        perceiver.attach(timm.create_model("vit_tiny_patch16_224"))
    with pytest.raises(BadArgument, match="verify=.* answers once per image"):
        perceiver.attach(model, **SMALL)
        offramp.enable(model, "fixed", depth=3, verify=True)
