"""The norm head starts as a copy or anew, whatever kind of norm the model has."""

import pytest
import torch
from torch import nn

import offramp
from offramp.testing.heads import check_head
from offramp.testing.toy import ToyModel


@pytest.fixture
def odd(model):
    """A model whose final norm has learnt something."""
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model


@pytest.mark.parametrize("init", ["copy", "random"])
def test_contract(init):
    check_head("norm", init=init)


def test_a_copy_is_tied_and_random_is_new(odd):
    x = torch.randn(4, 16)
    with offramp.attach(odd, [2], head="tied") as exits:
        wanted = exits[2](x)
    with offramp.attach(odd, [2], head="norm") as exits:
        assert torch.equal(exits[2](x), wanted)
    before = odd.norm.weight.clone()
    with offramp.attach(odd, [2], head="norm", init="random") as exits:
        assert torch.equal(exits[2].exit_norm.weight, torch.ones(16)) and not exits[2].exit_norm.bias.any()
        assert torch.equal(exits[2](x), odd.head(nn.functional.layer_norm(x, (16,))))
    assert torch.equal(odd.norm.weight, before)


class Gain(nn.Module):
    """A norm without `reset_parameters`, as transformers has them: `plus` 1 is Gemma's, which starts at gain 0."""

    def __init__(self, plus):
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.randn(16)), plus

    def forward(self, x):
        return nn.functional.rms_norm(x, (16,)) * (self.weight + self.plus)


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_a_norm_of_the_frameworks_own_starts_with_gain_one(plus):
    model = ToyModel()
    model.norm = nn.Sequential(nn.Linear(16, 16), Gain(plus))
    with offramp.attach(model, [2], head="norm", init="random") as exits:
        dense, norm = exits[2].exit_norm
        assert torch.equal(norm.weight, torch.full((16,), 1.0 - plus))
        assert not torch.equal(dense.weight, model.norm[0].weight) and dense.weight.std() > 0.05


def test_an_unknown_start(model):
    with pytest.raises(offramp.OfframpError, match="norm: init 'zero' is not one of copy, random"):
        offramp.attach(model, [2], head="norm", init="zero")
    assert not hasattr(model, "exits")
