"""Training a gate towards how right exits are: targets by hand, and end to end for classes and numbers."""

import pytest
import torch

import offramp
from offramp._registry import create
from offramp.errors import BadArgument
from offramp.testing.toy import ToyModel


def made(**options):
    return create(offramp.Loss, "learned_to_exit", **options)


def read(model, exits, x, targets, **options):
    states = exits.backbone.observe(x, exits.at)
    final = exits.backbone.context().readout(states.final)
    odds, right, _ = made(**options).read(exits, states.hidden, final, targets, range(len(exits)))
    return torch.stack(odds, 1), right, [exits[d](h) for d, h in zip(exits.at, states.hidden, strict=True)], final


@torch.no_grad()
def test_targets_of_classes(model):
    exits = offramp.attach(model, [2, 4], gate="learned_to_exit")
    x, targets = torch.randn(30, 3, 8), torch.randint(5, (30,))
    targets[3] = -100
    odds, right, answers, final = read(model, exits, x, targets)
    keep = targets >= 0
    assert odds.shape == right.shape == (29, 2)
    assert torch.equal(right, torch.stack([(a.argmax(-1) == targets).float()[keep] for a in answers], 1))
    _, right, _, _ = read(model, exits, x, None, towards="full")
    assert torch.equal(right, torch.stack([(a.argmax(-1) == final.argmax(-1)).float() for a in answers], 1))


@torch.no_grad()
def test_targets_of_numbers():
    model = ToyModel(classes=1).eval()
    exits = offramp.attach(model, [2, 4], gate="learned_to_exit")
    x, targets = torch.randn(30, 3, 8), torch.randn(30)
    _, right, answers, final = read(model, exits, x, targets)
    assert torch.allclose(right, torch.stack([1 - (a[:, 0] - targets).tanh().abs() for a in answers], 1))
    _, right, _, _ = read(model, exits, x, None, towards="full")
    assert torch.allclose(right, torch.stack([1 - (a - final)[:, 0].tanh().abs() for a in answers], 1))


def test_the_error_is_squared():
    found = made().each([torch.zeros(4)], torch.zeros(4, 3), torch.tensor([[1.0], [0.0], [0.5], [1.0]]))
    assert found[0].item() == pytest.approx((0.25 * 3) / 4)


@pytest.mark.parametrize("per_exit", [False, True])
def test_it_learns_which_exits_are_right(per_exit):
    torch.manual_seed(0)
    model = ToyModel().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.mul_(12)
    exits = offramp.attach(model, [2, 4], gate={"gate": "learned_to_exit", "per_exit": per_exit})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(600, 3, 8)
    offramp.fit(model, x, loss="learned_to_exit", towards="full", steps=200, lr=3e-2, progress=False)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"exits.gate.weight", "exits.gate.bias"}
    assert len(exits.gate_module.weight) == (2 if per_exit else 1)
    trace = offramp.record(model, torch.randn(400, 3, 8))
    agrees, said = trace.label[:, :2] == trace.label[:, 2:], trace.stats["learned_to_exit"][:, :2]
    for k in range(2):
        yes, no = said[agrees[:, k], k], said[~agrees[:, k], k]
        assert float((yes[:, None] > no[None]).float().mean()) > 0.6


def test_without_labels_it_says_what_to_write(model, x):
    offramp.attach(model, [2], gate="learned_to_exit")
    with pytest.raises(BadArgument, match='towards="full"'):
        offramp.fit(model, x, loss="learned_to_exit", progress=False)
    with pytest.raises(BadArgument, match="towards 'truth' is not one of labels, full"):
        made(towards="truth")
