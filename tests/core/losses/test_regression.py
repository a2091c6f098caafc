"""Exits that predict numbers: learned from the model and from labels, and what is refused there."""

import pytest
import torch

import offramp
from offramp._registry import create
from offramp.errors import BadArgument
from offramp.testing.toy import ToyModel


@pytest.fixture
def numbers():
    torch.manual_seed(0)
    return ToyModel(classes=2).eval()


def test_distances_by_hand():
    final, exit_ = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert create(offramp.Loss, "regression").each([exit_], final, None)[0].item() == pytest.approx(10 / 4)
    huber = create(offramp.Loss, "regression", distance="huber", delta=1.0)
    assert huber.each([exit_], final, None)[0].item() == pytest.approx((0.5 + 2.5) / 4)


@pytest.mark.parametrize("loss", ["regression", "labels"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_exits_learn_numbers(loss, outputs):
    torch.manual_seed(0)
    model = ToyModel(classes=outputs).eval()
    offramp.attach(model, [2, 4], head="linear")
    x = torch.randn(300, 3, 8)
    wanted = x[:, 0, :outputs] * 2 + 1
    data = {"x": x, "labels": wanted if outputs > 1 else wanted[:, 0]}
    report = offramp.fit(model, data, loss=loss, steps=150, lr=2e-2, progress=False)
    assert report.losses[-1] < 0.5 * report.losses[0]
    trace = offramp.record(model, data, logits=True)
    full = (trace.logits[:, -1] - wanted).square().mean(-1)
    assert trace.targets is None and torch.allclose(trace.losses[:, -1], full, atol=1e-5)
    if loss == "labels":
        assert trace.losses[:, 1].mean() < 0.5 * full.mean()
    else:
        assert (trace.logits[:, 1] - trace.logits[:, 2]).square().mean() < 0.5 * trace.logits[:, 2].var()


def test_one_output_has_no_agreement_of_classes():
    model = ToyModel(classes=1).eval()
    offramp.attach(model, [2], head="linear")
    report = offramp.fit(model, torch.randn(40, 3, 8), loss="regression", steps=3, progress=False)
    assert all(v != v for v in (*report.before.values(), *report.agreement.values()))
    trace = offramp.record(model, torch.randn(9, 3, 8))
    assert offramp.simulate(trace, "fixed", depth=2).agreement != offramp.simulate(trace, "never").agreement  # NaN
    with pytest.raises(BadArgument, match='one output is no distribution.*loss="regression"'):
        offramp.fit(model, torch.randn(40, 3, 8), loss="distill", progress=False)


def test_labels_of_another_shape_are_refused(numbers):
    offramp.attach(numbers, [2], head="linear")
    with pytest.raises(BadArgument, match="labels are numbers of shape .* and predictions"):
        offramp.fit(numbers, {"x": torch.randn(9, 3, 8), "labels": torch.randn(9)}, loss="labels", progress=False)


@pytest.mark.parametrize("options", [{"distance": "city"}, {"delta": 0.0}])
def test_what_says_nothing(options):
    with pytest.raises(BadArgument, match="regression: d"):
        create(offramp.Loss, "regression", **options)
