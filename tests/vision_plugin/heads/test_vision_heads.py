"""Heads that read whole states: their contract, their shapes of computation, and what they refuse."""

import pytest
import timm
import torch
from torch.nn import functional

import offramp
from offramp.errors import BadArgument
from offramp.testing.heads import check_head
from offramp_vision.heads.lgvit import TABLE

HEADS = {
    "pooled_linear": {},
    "cls_linear": {},
    "conv": {"inner": 8},
    "local_perception": {"form": "b"},
    "global_aggregation": {"heads": 4},
    "lgvit": {"heads": 4},
}


def convnet():
    block = timm.models.resnet.BasicBlock
    return timm.models.resnet.ResNet(block, (2, 1, 1, 1), channels=(16, 16, 16, 32), num_classes=5)


def swin():
    return timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )


@pytest.mark.parametrize("name", [n for n in HEADS if n != "lgvit"])  # its two heads are of two kinds
def test_head_keeps_its_contract_on_a_transformer(name, model):
    check_head(name, model, **HEADS[name])


@pytest.mark.parametrize("name", ["pooled_linear", "conv", "local_perception", "global_aggregation"])
def test_head_keeps_its_contract_on_maps(name):
    check_head(name, swin(), **HEADS[name])


@pytest.mark.parametrize("name", [n for n in HEADS])
@torch.no_grad()
def test_images_leave_with_what_the_head_says_of_their_state(name, model, x):
    exits = offramp.attach(model, [2, 4], name, **HEADS[name])
    said = [exits[d](h) for d, h in zip(exits.at, exits.observe(x).hidden, strict=True)]
    with offramp.enable(model, "fixed", depth=4):
        assert torch.allclose(model(x), said[1], atol=1e-5)
    sure = said[0].softmax(-1).amax(-1)
    middle = sure.sort().values[2:4].mean().item()
    with offramp.enable(model, "confidence", threshold=middle) as run:
        out = model(x)
    early = run.stats.last_depths == 2
    assert early.tolist() == (sure > middle).tolist() and torch.allclose(out[early], said[0][early], atol=1e-5)


@torch.no_grad()
def test_local_perception_is_its_three_convolutions(model, x):
    with offramp.attach(model, [2], "local_perception") as exits:
        head, hidden = exits[2].eval(), exits.observe(x).hidden[0]
        image = hidden[:, 1:].transpose(1, 2).reshape(6, 48, 4, 4)
        one, _, norm, _, deep, _, norm2, last, norm3 = head.look
        seen = norm(functional.gelu(functional.conv2d(image, one.weight, one.bias)))
        seen = norm2(functional.gelu(functional.conv2d(seen, deep.weight, deep.bias, padding=1, groups=48)))
        seen = image + norm3(functional.conv2d(seen, last.weight, last.bias))
        wanted = functional.linear(seen.mean((2, 3)) + hidden[:, 0], head.proj.weight, head.proj.bias)
        assert torch.allclose(head(hidden), wanted, atol=1e-5)


@torch.no_grad()
def test_global_aggregation_looks_at_every_second_patch_only(model, x):
    with offramp.attach(model, [2], "global_aggregation", heads=4) as exits:
        hidden = exits.observe(x).hidden[0]
        kept = [1 + 4 * r + c for r in (0, 2) for c in (0, 2)]
        other = hidden.clone()
        other[:, [i for i in range(1, 17) if i not in kept]] += 1
        assert torch.equal(exits[2](other), exits[2](hidden))
        other[:, kept[-1]] += torch.randn(48)
        assert not torch.allclose(exits[2](other), exits[2](hidden))


@pytest.mark.parametrize("count", TABLE)
def test_placement_is_that_of_the_paper(count):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=9, num_heads=2, num_classes=5
    )
    with offramp.attach(model, range(1, count + 1), "lgvit") as exits:
        heads = [exits[d].inner for d in exits]
    kinds = [len(h.look) if hasattr(h, "look") else -h.stride for h in heads]  # 9 modules with depthwise, 6 without
    wanted = {2: [9, -2], 4: [9, 6, -2, -3], 6: [9, 6, -2, -2, -3, -3], 8: [9, 9, 6, 6, -2, -2, -3, -3]}
    assert kinds == wanted[count]


def test_heads_learn_with_batch_norm_in_train_mode_and_answer_in_eval_mode(x):
    model = convnet().eval()
    exits = offramp.attach(model, [1, 2], "conv")
    data = {"x": torch.randn(32, 3, 32, 32), "labels": torch.arange(32) % 5}
    before = exits[1].exit_norm.running_mean.clone()
    report = offramp.fit(model, data, loss="labels", steps=30, lr=1e-2, rows=32, progress=False)
    assert report.losses[-1] < report.losses[0] and not torch.equal(exits[1].exit_norm.running_mean, before)
    assert not exits[1].training
    exits[1].train()
    with offramp.enable(model, "confidence", threshold=0.5), pytest.raises(BadArgument, match="model.eval()"):
        model(x)


def test_what_heads_refuse(model):
    with pytest.raises(BadArgument, match="no class token after layer1.0"):
        offramp.attach(convnet(), [1], "cls_linear")
    with pytest.raises(BadArgument, match="width of 32.*pooled_linear"):
        offramp.attach(convnet(), [1], "linear")
    with pytest.raises(BadArgument, match="no placement for 3 exits"):
        offramp.attach(model, [1, 2, 3], "lgvit")
    with pytest.raises(BadArgument, match='neither "a" nor "b"'):
        offramp.attach(model, [1], "local_perception", form="c")
    with pytest.raises(BadArgument, match="stride 5.*from 1 to 4"):
        offramp.attach(model, [1], "global_aggregation", stride=5)
    for heads in (0, -4, 2.0, True):
        with pytest.raises(BadArgument, match=f"heads {heads} must be a whole number from 1 on"):
            offramp.attach(model, [1], "global_aggregation", heads=heads)
    offramp.attach(model, [1, 2], "pooled_linear")
    with pytest.raises(BadArgument, match="compares the states of neighbouring exits"):
        offramp.enable(model, "saturation", threshold=0.9)


def test_bad_images_are_refused_and_nan_runs_to_the_end(model, x):
    offramp.attach(model, [1, 2], "pooled_linear")
    with torch.no_grad(), offramp.enable(model, "confidence", threshold=0.11) as run:
        with pytest.raises(BadArgument, match="uint8 are not normalised"):
            model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        bad = x.clone()
        bad[2] = float("nan")
        assert model(bad)[2].isnan().all()
        assert run.stats.last_depths[2] == 6 and run.stats.nonfinite == 2
        assert model(x[:0]).shape == (0, 10)
        model.head = torch.nn.Linear(48, 7)
        with pytest.raises(BadArgument, match="its classifier was changed"):
            model(bad)
