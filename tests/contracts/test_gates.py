"""Every registered gate keeps the contract; gates that break one rule each are caught."""

import pytest
import torch

import offramp
from offramp import _registry
from offramp.gate import ExitGate
from offramp.gates.jei import Jei
from offramp.testing import ContractError
from offramp.testing.gates import check_gate


@pytest.mark.parametrize("name", offramp.names(offramp.ExitGate))
def test_contract(name):
    check_gate(name)


@pytest.mark.parametrize(("name", "options"), [("lambda", {"hidden": 5}), ("learned_to_exit", {"per_exit": True})])
def test_contract_with_options(name, options):
    check_gate(name, **options)


def broken(monkeypatch, base=Jei, **changes):
    cls = type("Broken", (base,), {"statistic": "broken", **changes})
    monkeypatch.setitem(_registry._classes, (ExitGate, "broken"), cls)


def through(self, hidden, index=0, previous=None, stats=None):
    return hidden.float().sum(-1) + self.weight.sum()


def across(self, hidden, index=0, previous=None, stats=None):
    return hidden.detach().float().sum().expand(hidden.shape[:-1]) + self.weight.sum()


def flat(self, hidden, index=0, previous=None, stats=None):
    return hidden.detach().float().sum() + self.weight.sum()


BROKEN = {
    "gradient to the state": ({"log_odds": through}, "gradient reaches"),
    "looks across rows": ({"log_odds": across}, "rows depend"),
    "no rows": ({"log_odds": flat}, r"must be \[rows\]"),
    "unknown statistic": ({"needs": frozenset({"mood"})}, "needs {'mood'}"),
    "unknown loss": ({"loss": "mood"}, "loss 'mood'"),
    "a prediction's name": ({"statistic": "top1"}, "statistic 'top1' is taken"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_found(monkeypatch, case):
    changes, message = BROKEN[case]
    broken(monkeypatch, **changes)
    with pytest.raises(ContractError, match=message):
        check_gate("broken")


def test_unbroken_passes(monkeypatch):
    broken(monkeypatch)
    check_gate("broken")


def test_a_third_partys_gate_is_found_attached_recorded_and_read(monkeypatch, tmp_path):
    from offramp.testing.toy import ToyModel, toy_plugin

    broken(monkeypatch)
    with toy_plugin():
        model = ToyModel().eval()
        exits = offramp.attach(model, [2, 4], gate="broken")
        assert "broken" not in offramp.record(model, torch.randn(5, 3, 8)).stats  # untrained, it says nothing yet
        torch.nn.init.normal_(exits.gate_module.weight)
        trace = offramp.record(model, torch.randn(5, 3, 8))
        said = trace.stats["broken"]
        assert said.shape == (5, 3) and (said[:, 2] == 1).all() and len(said[:, :2].unique()) == 10
        exits.save(tmp_path)
        exits.detach()
        assert offramp.load(model, tmp_path).gate == "broken"
