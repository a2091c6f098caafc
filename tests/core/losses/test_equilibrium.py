"""Gradient equilibrium: every layer gets the mean over the exits above it."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.fit import objective_of
from offramp.live import Live
from offramp.loss import row_losses
from offramp.losses.equilibrium import Equilibrium
from offramp.testing.toy import ToyModel


def gradients(model, exits, data, equilibrium):
    """The gradient of the loss in every weight of the model, by name."""
    live = Live(exits, data, len(data["x"]), 0, 0.0, equilibrium=equilibrium)
    model.zero_grad()
    loss = Equilibrium()
    if not equilibrium:
        object.__setattr__(loss, "equilibrium", False)
    objective_of(exits, loss, live.observe(data)).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def data():
    return {"x": torch.randn(6, 3, 8), "labels": torch.randint(5, (6,))}


@pytest.mark.parametrize("pair", [False, True])
def test_by_the_recursion(data, pair):
    """Exits at 2 and 4 of 6: the state at 4 gets (g4 + d) / 2, that at 2 (g2 + 2 d) / 3, worked out block by block."""
    model = ToyModel(pair=pair).eval()
    exits = offramp.attach(model, [2, 4], head="linear")
    found = gradients(model, exits, data, equilibrium=True)

    def run(hidden, start, stop):
        for block in model.blocks[start:stop]:
            out = block(hidden, torch.ones(6, 3))
            hidden = out[0] if pair else out
        return hidden

    def into(loss, hidden):
        return torch.autograd.grad(loss, hidden)[0]

    embedded = model.embed(data["x"])
    h2 = run(embedded, 0, 2).detach().requires_grad_()
    h4 = run(h2, 2, 4).detach().requires_grad_()
    last = row_losses(model.head(model.norm(run(h4, 4, 6)[:, 0])), data["labels"]).mean()
    d4 = (into(row_losses(exits[4](h4[:, 0]), data["labels"]).mean(), h4) + 1 * into(last, h4)) / 2
    below = torch.autograd.grad(run(h2, 2, 4), h2, grad_outputs=d4)[0]
    d2 = (into(row_losses(exits[2](h2[:, 0]), data["labels"]).mean(), h2) + 2 * below) / 3
    weight = model.blocks[0].up.weight
    (wanted,) = torch.autograd.grad(run(model.embed(data["x"]), 0, 2), weight, grad_outputs=d2)
    assert torch.allclose(found["blocks.0.up.weight"], wanted, atol=1e-7)
    (deep,) = torch.autograd.grad(run(h2.detach(), 2, 4), model.blocks[3].up.weight, grad_outputs=d4)
    assert torch.allclose(found["blocks.3.up.weight"], deep, atol=1e-7)


def test_heads_and_the_last_blocks_have_their_whole_gradient(data):
    model = ToyModel().eval()
    exits = offramp.attach(model, [2, 4], head="linear")
    plain, even = gradients(model, exits, data, False), gradients(model, exits, data, True)
    assert plain.keys() == even.keys()
    for name, gradient in plain.items():
        whole = name.startswith(("exits.", "blocks.4", "blocks.5", "norm", "head"))
        assert torch.allclose(even[name], gradient, atol=1e-7) == whole, name


def test_a_model_is_trained_with_it(data):
    torch.manual_seed(0)
    model = ToyModel().eval()
    offramp.attach(model, [2, 4], head="linear")
    x = torch.randn(64, 3, 8)
    rows = {"x": x, "labels": x[:, 0, :5].argmax(-1)}
    report = offramp.fit(
        model, rows, loss="equilibrium", backbone=True, steps=60, lr=1e-2, batch_size=32, progress=False
    )
    assert sum(report.losses[-5:]) < 0.5 * sum(report.losses[:5])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_frozen_model_has_no_gradients_to_bring_into_it(data):
    model = ToyModel().eval()
    offramp.attach(model, [2, 4], head="linear")
    with pytest.raises(BadArgument, match="gradients of the model itself; add backbone=True"):
        offramp.fit(model, data, loss="equilibrium", progress=False)
