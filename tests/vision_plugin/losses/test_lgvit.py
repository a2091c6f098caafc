"""LGViT's training: its distances by hand, which heads learn from what, and both stages on real heads."""

import pytest
import timm
import torch
from torch.nn import functional

import offramp
from offramp._registry import create
from offramp.errors import BadArgument
from offramp.loss import Loss, Moment
from offramp.stages import plan
from offramp_vision.losses.lgvit import Alternating, Perceived, heterogeneous, homogeneous, teacher_of

SHAPE = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2, "num_classes": 5}


def vit(**more):
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(**{**SHAPE, **more}).eval()


@pytest.fixture
def data():
    make = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 5
    x = torch.randn(40, 3, 24, 32, generator=make) * 0.3 + labels[:, None, None, None] / 2 - 1
    return {"x": x, "labels": labels}


def read(model, exits, data, loss=None):
    loss = loss or create(Loss, "lgvit")
    seen = exits.observe(data, deepest=True)
    final = exits.backbone.context().readout(seen.final)
    return loss.read(exits, [*seen.hidden, seen.last], final, seen.targets, range(len(exits))), final, seen


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
@torch.no_grad()
def test_heads_answer_as_ever_and_the_teacher_is_the_normed_patches(prefix, data):
    """Any number of prefix tokens, on a grid that is no square."""
    model = vit(**prefix)
    exits = offramp.attach(model, [1, 2, 3, 4], "lgvit", heads=2)
    (said, targets, seen), _, observed = read(model, exits, data)
    for depth, answer, hidden in zip(exits.at, said, observed.hidden, strict=True):
        assert torch.equal(answer, exits[depth](hidden))
    assert torch.equal(targets, data["labels"])
    assert seen.strides == [0, 0, 2, 3] and [f.shape[1] for f in seen.features] == [12, 12, 4, 2]
    patches = model.forward_features(data["x"])[:, model.num_prefix_tokens :]  # after the model's own norm
    assert torch.allclose(seen.teacher.flatten(2).transpose(1, 2), patches if prefix.get("global_pool") is None
                          else model.norm(observed.last), atol=1e-5)  # fmt: skip
    assert seen.teacher.shape[2:] == (3, 4)


def test_distances_by_hand():
    make = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 6, 4, 4, generator=make)
    features = [torch.randn(3, n, 6, generator=make) for n in (16, 16, 16, 4, 4)]
    seen = Perceived(features, [0, 0, 0, 2, 3], teacher)

    def apart(i, step):
        wanted = teacher[:, :, ::step, ::step].flatten(2).transpose(1, 2).softmax(-1)
        return (wanted * (wanted.log() - features[i].log_softmax(-1))).sum() / 3

    wanted = apart(0, 1) + apart(2, 1) + apart(3, 2) + apart(4, 3)  # the second of three local ones learns no such
    assert heterogeneous(seen).item() == pytest.approx(wanted.item(), rel=1e-5)
    gram = [features[i].transpose(1, 2) @ features[i] / 4 for i in (3, 4)]
    wanted = sum(functional.mse_loss(features[i], features[2]) for i in (0, 1)) + functional.mse_loss(*gram)
    assert homogeneous(seen).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_no_gradient_reaches_a_teacher():
    features = [torch.randn(2, 4, 6, requires_grad=True) for _ in range(2)]
    teacher = torch.randn(2, 6, 2, 2)
    homogeneous(Perceived(features, [0, 0], teacher)).backward()
    assert features[0].grad.abs().sum() > 0 and features[1].grad is None


def test_what_does_not_compare_is_left_out():
    """Of a hierarchy, tokens of one stage have another width and grid than those of the next."""
    features = [torch.randn(2, 16, 6), torch.randn(2, 4, 12)]
    seen = Perceived(features, [0, 0], torch.randn(2, 24, 2, 2))
    assert heterogeneous(seen).item() == 0 and homogeneous(seen).item() == 0


def test_the_call_is_predictions_and_distances():
    make = torch.Generator().manual_seed(0)
    said, final = torch.randn(2, 8, 5, generator=make).unbind(0), torch.randn(8, 5, generator=make)
    targets = torch.randint(5, (8,), generator=make)
    seen = Perceived(list(torch.randn(2, 8, 4, 6, generator=make)), [0, 2], torch.randn(8, 6, 4, 4, generator=make))
    loss = create(Loss, "lgvit", alpha=0.25, temperature=3.0, heterogeneous=0.5, homogeneous=0.125)
    parts = []
    for p in said:
        soft = (final / 3).softmax(-1)
        kl = (soft * (soft.log() - (p / 3).log_softmax(-1))).sum(-1).mean() * 9
        parts.append(0.75 * functional.cross_entropy(p, targets) + 0.25 * kl)
    alone = sum(parts).item() / 2
    assert loss(said, final, targets).item() == pytest.approx(alone, rel=1e-5)
    far = 0.5 * heterogeneous(seen).item() + 0.125 * homogeneous(seen).item()
    whole = loss(said, final, targets, moment=Moment(more=seen)).item()
    assert whole == pytest.approx(alone + far / 2, rel=1e-5) and far > 0


def test_the_first_stage_alternates_and_weighs_depth():
    first, second = plan("two_stage", create(Loss, "lgvit"), 10, False)
    assert first.loss == Alternating() and first.backbone and not second.backbone
    assert [tuple(Alternating().active(s, 9, 2)) for s in range(3)] == [(), (0, 1), ()]
    said, final, targets = torch.randn(2, 6, 5).unbind(0), torch.randn(6, 5), torch.randint(5, (6,))
    each = [functional.cross_entropy(p, targets).item() for p in (*said, final)]
    found = Alternating()(said, final, targets, moment=Moment(depths=(2, 5, 6))).item()
    assert found == pytest.approx((2 * each[0] + 5 * each[1] + 6 * each[2]) / 13, rel=1e-5)


@pytest.mark.parametrize("schedule", [None, "two_stage"])
def test_exits_learn_and_a_frozen_model_stays(schedule, data):
    model = vit(reg_tokens=2)
    exits = offramp.attach(model, [1, 2, 3, 4], "lgvit", heads=2)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("exits.")}
    report = offramp.fit(
        model, data, loss="lgvit", schedule=schedule, steps=60, lr=3e-3, rows=20, batch_size=20, progress=False
    )
    still = all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert still is (schedule is None) and not any(exits[d].training for d in exits)
    if schedule is not None:  # the labels are in the images' brightness
        trace = offramp.record(model, data, batch_size=20)
        assert [bool((trace.label[:, k] == trace.targets).double().mean() > 0.6) for k in range(4)] == [True] * 4
    else:
        assert report.losses[-1] < report.losses[0]


def test_convnets_have_the_predictions_part(data):
    block = timm.models.resnet.BasicBlock
    model = timm.models.resnet.ResNet(block, (1, 1, 1, 1), channels=(16, 16, 24, 32), num_classes=5).eval()
    exits = offramp.attach(model, [1, 2], "lgvit", heads=4)
    (_, _, seen), *_ = read(model, exits, data)
    assert heterogeneous(seen).item() == 0
    report = offramp.fit(model, data, loss="lgvit", steps=20, lr=1e-2, rows=20, progress=False)
    assert report.losses[-1] < report.losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be a share"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"homogeneous": -1}, "homogeneous must be a weight"),
        ({"backbone": True}, "leave backbone=True out"),
        ({"schedule": "joint"}, 'use "frozen" or "two_stage"'),
    ],
)
def test_what_it_refuses(options, message, data):
    model = vit()
    offramp.attach(model, [1, 2], "lgvit", heads=2)
    with pytest.raises(BadArgument, match=message):
        offramp.fit(model, data, loss="lgvit", progress=False, **options)


def test_other_heads_and_data_without_labels_are_refused(data):
    model = vit()
    exits = offramp.attach(model, [1, 2], "pooled_linear")
    with pytest.raises(BadArgument, match="perceive nothing; attach head='lgvit'"):
        offramp.fit(model, data, loss="lgvit", progress=False)
    exits.detach()
    offramp.attach(model, [1, 2], "local_perception")
    with pytest.raises(BadArgument, match='loss "lgvit" needs labels'):
        offramp.fit(model, data["x"], loss="lgvit", steps=2, progress=False)


def test_a_teacher_without_a_norm_is_taken_as_it_is(data):
    block = timm.models.resnet.BasicBlock
    model = timm.models.resnet.ResNet(block, (1, 1, 1, 1), channels=(16, 16, 24, 32), num_classes=5).eval()
    exits = offramp.attach(model, [1, 2], "local_perception")
    last = exits.observe(data, deepest=True).last
    assert torch.equal(teacher_of(exits, last), last)
