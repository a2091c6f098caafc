"""Schedules of a training by name: what each stage trains, on what, and what is refused."""

import pytest
import torch

import offramp
from offramp._registry import create
from offramp.errors import BadArgument, UnknownName
from offramp.loss import Loss, row_losses
from offramp.stages import LastLayer, WithLast, plan
from offramp.testing.toy import ToyModel


@pytest.fixture
def data():
    make = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, generator=make)
    return {"x": x, "labels": (x[:, 0] @ torch.randn(8, 5, generator=make)).argmax(-1)}


def moved(model, before):
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def copy(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def train(model, data, **options):
    given = {"loss": "labels", "batch_size": 32, "lr": 1e-2, "progress": False, "steps": 40}
    return offramp.fit(model, data, **{**given, **options})


def test_plans():
    loss = create(Loss, "labels")
    found = {name: [(s.steps, s.backbone) for s in plan(name, loss, 9, False)] for name in ("frozen", "joint")}
    assert found == {"frozen": [(9, False)], "joint": [(9, True)]}
    first, second = plan("two_stage", loss, 9, False)
    assert (first.steps, first.backbone, first.loss) == (4, True, LastLayer())
    assert (second.steps, second.backbone, second.loss) == (5, False, loss)
    assert plan(None, loss, 9, True)[0].backbone and plan(None, loss, 9, True)[0].loss is loss
    layerskip = create(Loss, "layerskip")
    assert plan("joint", layerskip, 9, False)[0].loss is layerskip  # it trains the last layer already


def test_the_last_layer_weighs_as_the_deepest_exit():
    exits, final, targets = torch.randn(2, 6, 5).unbind(0), torch.randn(6, 5), torch.randint(5, (6,))
    each = [row_losses(p, targets).mean().item() for p in (*exits, final)]
    loss = WithLast(create(Loss, "labels", weighting="linear"))
    assert loss(exits, final, targets).item() == pytest.approx((each[0] + 2 * each[1] + 3 * each[2]) / 6, abs=1e-6)
    assert WithLast(create(Loss, "labels"), turns=True)([], final, targets).item() == pytest.approx(each[2], abs=1e-6)
    assert [tuple(WithLast(loss, turns=True).active(s, 9, 2)) for s in range(3)] == [(), (0, 1), ()]


def test_two_stages_are_two_trainings(data):
    """Model and last layer alone, then exits alone: as two calls of `fit`, but in one."""
    torch.manual_seed(0)
    model = ToyModel().eval()
    exits = offramp.attach(model, [2, 4], head="linear")
    own, before = {k for k in model.state_dict() if k.startswith("exits.")}, copy(model)
    watched = []
    exits[2].register_forward_pre_hook(lambda m, args: watched.append(copy(model)) if torch.is_grad_enabled() else None)
    report = train(model, data, schedule="two_stage")
    assert len(report.losses) == 40 and report.losses[19] < 0.5 * report.losses[0]
    assert report.losses[-1] < report.losses[20]
    # the heads are not asked before the second stage, when the model no longer moves
    assert len(watched) == 20 and not {k for k in own if not torch.equal(watched[0][k], before[k])}
    assert moved(model, watched[0]) == own and moved(model, before) == set(before)
    with torch.no_grad():
        assert float((model(data["x"]).argmax(-1) == data["labels"]).float().mean()) > 0.8


@pytest.mark.parametrize("schedule", ["joint", "alternate"])
def test_model_and_exits_are_trained_together(data, schedule):
    torch.manual_seed(0)
    model = ToyModel().eval()
    offramp.attach(model, [2, 4], head="linear")
    before = copy(model)
    report = train(model, data, schedule=schedule, steps=80)
    assert moved(model, before) == set(before) and report.agreement[4] > 0.7
    with torch.no_grad():
        assert float((model(data["x"]).argmax(-1) == data["labels"]).float().mean()) > 0.8


def test_frozen_is_what_none_is(data):
    found = []
    for schedule in (None, "frozen"):
        torch.manual_seed(0)
        model = ToyModel().eval()
        offramp.attach(model, [2], head="linear")
        found.append(train(model, data, schedule=schedule, steps=5).losses)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "two_stages"}, UnknownName, "did you mean 'two_stage'"),
        ({"schedule": "joint", "backbone": True}, BadArgument, "leave backbone out"),
        ({"schedule": "two_stage", "steps": 1}, BadArgument, "leaves a stage without any"),
        ({"schedule": "joint", "loss": "gate"}, BadArgument, 'use "frozen" or "two_stage"'),
        ({"schedule": "alternate", "loss": "layerskip"}, BadArgument, "cannot be trained with schedule='alternate'"),
        ({"schedule": "two_stage", "loss": "ponder"}, offramp.OfframpError, 'attach one: .*gate="lambda"'),
        ({"schedule": "joint", "loss": "distill", "data": torch.randn(9, 3, 8)}, BadArgument, "needs labels"),
        ({"schedule": 3}, BadArgument, "schedule=3 needs"),
    ],
)
def test_what_fails_changes_nothing(data, options, error, message):
    model = ToyModel().eval()
    offramp.attach(model, [2, 4], head="linear", gate="linear")
    before, flags = copy(model), [p.requires_grad for p in model.parameters()]
    given = {"data": data, **options}
    with pytest.raises(error, match=message):
        train(model, **given)
    assert not moved(model, before) and [p.requires_grad for p in model.parameters()] == flags
