"""The MLP head: the logit lens or a random start, and more than a norm can learn."""

import pytest
import torch

import offramp
from offramp.testing.heads import check_head
from offramp.testing.toy import ToyModel


@pytest.mark.parametrize("options", [{}, {"ratio": 0.5}, {"init": "random"}])
def test_contract(options):
    check_head("mlp", **options)


@pytest.mark.parametrize("init", ["copy", "random"])
def test_only_a_copy_is_the_logit_lens(model, init):
    x = torch.randn(4, 16)
    exits = offramp.attach(model, [2], head="mlp", init=init)
    assert torch.equal(exits[2](x), model.head(model.norm(x))) == (init == "copy")
    assert exits[2].inward.weight.shape == (64, 16)
    assert sum(p.numel() for p in exits[2].parameters()) == 2 * 64 * 16 + 48


def test_it_learns_what_a_norm_cannot():
    found = {}
    for head in ("norm", "mlp"):
        torch.manual_seed(0)
        model = ToyModel().eval()
        with torch.no_grad():
            for block in model.blocks:
                block.down.weight.mul_(12)
        offramp.attach(model, [2], head=head)
        report = offramp.fit(model, torch.randn(400, 3, 8), steps=100, lr=1e-2, batch_size=100, progress=False)
        found[head] = report.agreement[2]
    assert found["mlp"] > found["norm"] + 0.1


def test_saved_and_loaded(model, tmp_path):
    exits = offramp.attach(model, [2], head="mlp", ratio=2, init="random")
    x = torch.randn(4, 16)
    wanted = exits[2](x)
    exits.save(tmp_path / "exits")
    exits.detach()
    assert torch.equal(offramp.load(model, tmp_path / "exits")[2](x), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"init": "none"}, "mlp: init 'none' is not one of copy, random"), ({"ratio": 0}, "leaves no inner units")],
)
def test_what_cannot_be_built(model, options, message):
    with pytest.raises(offramp.OfframpError, match=message):
        offramp.attach(model, [2], head="mlp", **options)
    assert not hasattr(model, "exits")
