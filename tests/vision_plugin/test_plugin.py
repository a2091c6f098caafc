"""What the timm plugin claims, what it refuses and in which words, the config flag, and watching timm."""

import importlib
import json
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import offramp
from offramp._plugins import adapt
from offramp.enable import RUN
from offramp.errors import BadArgument, NotAttached, UnsupportedModel
from offramp_vision.plugin import offramp_adapt

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
NAME = "vit_tiny_patch16_224"


def test_only_models_of_timm_are_claimed(model):
    class Mine(timm.models.vision_transformer.VisionTransformer):
        """A user's own subclass."""

    assert offramp_adapt(nn.Linear(2, 2)) is None
    assert offramp_adapt(nn.Sequential(model)) is None
    assert offramp_adapt(Mine(**TINY)).depth == 3
    with pytest.raises(UnsupportedModel, match="no plugin claims torch"):
        offramp.attach(nn.Linear(2, 2), at=1)


REFUSED = {
    "hrnet_w18_small": "HighResolutionNet .*no chain of blocks is found in it .its parts: .*supported:",
    "vgg11": "VGG .*no chain of blocks is found",
    "tnt_s_patch16_224": "TNT is a timm model, but .*supported:",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_with_the_reason(name):
    model = timm.create_model(name)
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        offramp.attach(model, at=[1])
    hooked = [m for m in model.modules() if "forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks]
    assert not hooked and model.training


def test_no_classifier_and_no_depth_are_refused(make):
    with pytest.raises(UnsupportedModel, match="no classifier.*num_classes"):
        offramp.attach(make(num_classes=0), at=[1])
    with pytest.raises(UnsupportedModel, match="fewer than 2 blocks"):
        offramp.attach(make(depth=1), at=[1])


def test_features_for_another_model_are_refused_and_pass_through(model, x):
    with pytest.raises(UnsupportedModel, match="no classifier.*features_only=True"):
        offramp.attach(timm.create_model("resnet10t", features_only=True), at=[1])
    with torch.no_grad():
        plain = model.forward_intermediates(x, indices=2, intermediates_only=True)
        offramp.attach(model, at=[1])
        with offramp.enable(model, "fixed", depth=1):
            mine = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, mine, strict=True))


def test_a_model_that_cannot_be_called_is_refused(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward_head", lambda self, x: 1 / 0)
    with pytest.raises(UnsupportedModel, match="calling it on images failed .ZeroDivisionError"):
        offramp.attach(model, at=[1])


def test_attach_leaves_modes_and_random_numbers_alone(make):
    model = make(drop_rate=0.5, pos_drop_rate=0.5).train()
    model.norm.eval()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    offramp.attach(model, at=[1])
    assert torch.equal(torch.rand(4), wanted)
    assert model.training and model.blocks.training and not model.norm.training


@pytest.mark.parametrize("option", [{"verify": True}, {"draft": 4}, {"kv": "propagate"}, {"window": 5}])
def test_options_of_generation_are_refused(option, model, x, marks):
    offramp.attach(model, at=[2])
    before = marks(model)
    with pytest.raises(BadArgument, match=f"{next(iter(option))}=.* answers once per image"):
        offramp.enable(model, "fixed", depth=2, **option)
    assert marks(model) == before


def test_batches_come_in_several_forms(model, x):
    y = torch.arange(6)
    backbone = adapt(model)
    forms = [(x, y), [x, y], {"pixel_values": x, "labels": y}, {"x": x, "y": y}]
    plain = backbone.observe(x, [2])
    assert plain.targets is None and torch.equal(plain.sample, y)
    for form in forms:
        seen = backbone.observe(form, [2])
        assert torch.equal(seen.targets, y) and torch.equal(seen.final, plain.final)
        assert torch.equal(backbone.call(form), model(x))


@pytest.mark.parametrize("batch", [torch.zeros(3, 4), {"image": 1}, "x", (torch.zeros(1, 3, 32, 32), "cat")])
def test_other_batches_are_refused(batch, model):
    with pytest.raises(BadArgument, match="a batch of images is a tensor .* got "):
        adapt(model).observe(batch, [2])


def test_save_and_load(model, make, x, tmp_path):
    exits = offramp.attach(model, at=[2, 4], head="linear")
    with torch.no_grad():
        exits[2].proj.weight.mul_(2)
    exits.save(tmp_path)
    other = make()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("exits.")})
    offramp.load(other, tmp_path)
    with offramp.enable(model, "fixed", depth=2), offramp.enable(other, "fixed", depth=2):
        assert torch.equal(model(x), other(x))
    with pytest.raises(offramp.OfframpError, match="depth 6"):
        offramp.load(make(depth=5), tmp_path)


def test_the_flag_is_read_from_pretrained_cfg(model, x):
    model.pretrained_cfg = {"early_exit": {"policy": "fixed", "depth": 2}}
    with pytest.raises(NotAttached):
        offramp.enable(model)
    offramp.attach(model, at=[2])
    with offramp.enable(model) as run:
        model(x)
        assert run.stats.exits == {2: 6}
    model.pretrained_cfg = {"early_exit": {"policy": "fixed", "deep": 2}}
    with pytest.raises(BadArgument, match="did you mean 'depth'"):
        offramp.enable(model)
    model.pretrained_cfg = {}
    with pytest.raises(BadArgument, match="no early_exit"):
        offramp.enable(model)


@pytest.fixture
def auto():
    module = importlib.import_module("offramp.auto")
    module.off()
    before = {name: timm_place(name).create_model for name in PLACES}
    module.on()
    yield module
    module.off()
    assert {name: timm_place(name).create_model for name in PLACES} == before


PLACES = ("timm", "timm.models", "timm.models._factory")


def timm_place(name):
    return importlib.import_module(name)


def saved(tmp_path):
    model = timm.create_model(NAME, **TINY)
    exits = offramp.attach(model, at=[1, 2])
    exits.save(tmp_path / "exits")
    return {"policy": "fixed", "depth": 1, "exits": str(tmp_path / "exits")}


def test_models_with_the_flag_come_enabled(auto, tmp_path, x):
    flag = saved(tmp_path)
    assert all(timm_place(n).create_model is timm.create_model for n in PLACES)
    model = timm.create_model(NAME, pretrained_cfg_overlay={"early_exit": flag}, **TINY).eval()
    assert model.pretrained_cfg["early_exit"] == flag and model.pretrained_cfg["architecture"] == NAME
    model(x)
    run = model.__dict__[RUN]
    assert run.stats.exits == {1: 6} and run.stats.saved == pytest.approx(2 / 3)
    run.disable()
    plain = timm.create_model(NAME, **TINY)
    assert RUN not in plain.__dict__ and "early_exit" not in plain.pretrained_cfg
    config = {k: v for k, v in plain.pretrained_cfg.items() if k != "state_dict"}
    assert RUN in timm.create_model(NAME, pretrained_cfg={**config, "early_exit": flag}, **TINY).__dict__


def test_models_from_a_folder_come_enabled(auto, tmp_path):
    plain = timm.create_model(NAME, **TINY)
    config = {"architecture": NAME, "pretrained_cfg": {"early_exit": saved(tmp_path)}, "model_args": TINY}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 5}))
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    model = timm.create_model(f"local-dir:{tmp_path}")
    assert RUN in model.__dict__


def test_off_gives_timm_back(auto):
    auto.off()
    with pytest.raises(TypeError, match="early_exit"):  # timm itself knows no such key
        timm.create_model(NAME, pretrained_cfg_overlay={"early_exit": {}}, **TINY)


def test_a_wrong_flag_is_an_error_not_a_silence(auto):
    with pytest.raises(BadArgument, match="did you mean 'fixed'"):
        timm.create_model(NAME, pretrained_cfg_overlay={"early_exit": {"policy": "fixd"}}, **TINY)


def test_finding_the_plugin_does_not_import_timm():
    code = (
        "import sys, offramp.auto, offramp_vision.plugin\n"
        "print('timm' in sys.modules)\n"
        "import timm\n"
        "print(timm.create_model.__closure__ is not None, timm.models.create_model is timm.create_model)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
