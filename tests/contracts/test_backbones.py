"""The backbone contract on the toy, and proof that it can fail."""

import copy

import pytest
import torch

from offramp.backbone import Observed
from offramp.blocks import Chain
from offramp.testing import ContractError
from offramp.testing.backbones import check_backbone, tensors
from offramp.testing.toy import ToyBackbone, ToyModel

SHAPES = {
    "plain": {},
    "shared": {"shared": True},
    "pair": {"pair": True},
    "one block": {"depth": 1},
    "two": {"depth": 2},
}


def batch():
    return {
        "x": torch.randn(4, 3, 8),
        "mask": (torch.rand(4, 3) > 0.3).float().clamp(min=0.1),
        "labels": torch.arange(4),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_toy_keeps_the_contract(shape):
    check_backbone(ToyBackbone(ToyModel(**SHAPES[shape]).eval()), batch())


class WrongTaps(ToyBackbone):
    def taps(self):
        return super().taps()[1:]


class WrongOrder(ToyBackbone):
    def chain(self):
        chain = super().chain()
        return Chain(chain.blocks[::-1], chain.spec)


class LateState(ToyBackbone):
    def observe(self, batch, depths):
        seen = super().observe(batch, depths)
        return Observed([h + 1 for h in seen.hidden], seen.final)


class MissingState(ToyBackbone):
    def observe(self, batch, depths):
        seen = super().observe(batch, depths)
        return Observed(seen.hidden[1:], seen.final)


class Forgetful(ToyBackbone):
    def observe(self, batch, depths):
        self.model.head.bias.data.add_(1)
        return super().observe(batch, depths)


class Leaky(ToyBackbone):
    """Its undo leaves the hooks of the first block."""

    def chain(self):
        chain = super().chain()
        chain.install = lambda handler: Chain.install(chain, handler) and (lambda: None)
        return chain


class WrongReadout(ToyBackbone):
    def context(self):
        base = super().context()
        return type(base)(base.norm, base.projection, torch.tanh, base.width, base.classes)


class OneModel(ToyBackbone):
    def __deepcopy__(self, memo):
        return copy.copy(self)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WrongTaps, "taps are at"),
        (WrongOrder, "windows|order"),
        (LateState, "not the state of a plain call"),
        (MissingState, "one .rows, width. per depth"),
        (Forgetful, "observe\\(\\) changed"),
        (Leaky, "windows|hooks|model"),
        (WrongReadout, "readout\\(observe\\(\\).final\\)"),
        (OneModel, "deep copy"),
    ],
)
def test_the_contract_can_fail(kind, message):
    with pytest.raises(ContractError, match=message):
        check_backbone(kind(ToyModel().eval()), batch())


def test_tensors_are_found_in_any_packing():
    a, b = torch.zeros(1), torch.ones(2)
    assert list(tensors({"a": (a, [b, None]), "n": 3, "ids": torch.arange(2)})) == [a, b]
