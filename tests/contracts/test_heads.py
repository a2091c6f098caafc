"""The head contract over every registered head, and proof that it can fail."""

import pytest
import torch
from torch import nn

import offramp
from offramp import _registry
from offramp.heads.tied import Tied
from offramp.testing import ContractError
from offramp.testing.heads import check_head

#: heads of core work on any model; those of a plugin are checked by the plugin's own tests, on a model of its framework
NAMES = [
    n
    for n in offramp.names(offramp.ExitHead)
    if _registry.lookup(offramp.ExitHead, n).__module__.startswith("offramp.heads.")
]


def test_the_built_in_heads_are_found():
    assert {"tied", "linear", "translator"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_head_keeps_the_contract(name):
    check_head(name)


def broken(monkeypatch, **changes):
    """Register a tied head with methods replaced, for one test."""
    cls = type("Broken", (Tied,), {"build": classmethod(lambda cls, tap, base: cls(base)), **changes})
    monkeypatch.setitem(_registry._classes, (offramp.ExitHead, "broken"), cls)


def register_base(self, base):
    Tied.__init__(self, base)
    self.projection = base.projection


def steal(cls, tap, base):
    with torch.no_grad():
        base.projection.weight.add_(1)
    return cls(base)


def random_map(self, base):
    Tied.__init__(self, base)
    self.map = nn.Linear(base.width, base.classes)


BROKEN = {
    "readout": ({"forward": lambda self, h: Tied.forward(self, h.abs())}, "own readout"),
    "shape": ({"forward": lambda self, h: Tied.forward(self, h).flatten(0, -2)}, r"\(2, 3, 16\) gives \(6, 5\)"),
    "not saved": ({"own_state": lambda self: {}}, "own_state\\(\\) is empty"),
    "half saved": ({"own_state": lambda self: {"w": self.exit_norm.weight}}, "does not save|says something else"),
    "backbone saved": ({"__init__": register_base}, "holds the backbone's weights"),
    "backbone changed": ({"build": classmethod(steal)}, "changed the backbone's weight head.weight"),
    "no gradient": ({"forward": lambda self, h: Tied.forward(self, h).detach()}, "no gradient|gets a gradient"),
    "narrowed": ({"narrowed": lambda self, ids: Tied.narrowed(self, ids.flip(0))}, "says something else of these"),
    "unused weights": ({"__init__": random_map}, "get no gradient"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_contract_can_fail(monkeypatch, case):
    changes, message = BROKEN[case]
    broken(monkeypatch, **changes)
    with pytest.raises(ContractError, match=message):
        check_head("broken")


def test_unbroken_passes(monkeypatch):
    broken(monkeypatch)
    check_head("broken")
