"""Every registered calibrator keeps the contract; and calibrators that break one rule each are caught."""

import dataclasses
import time
from dataclasses import dataclass

import pytest
import torch

import offramp
from offramp._registry import create, lookup
from offramp.calibration import Calibration
from offramp.calibrator import Calibrator
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy
from offramp.testing import ContractError
from offramp.testing.calibrators import check_calibrator, toy_trace

RISKS = ["disagreement", "accuracy_drop", "excess_loss"]


@pytest.mark.parametrize("risk", RISKS)
@pytest.mark.parametrize("name", offramp.names(Calibrator))
def test_contract(name, risk):
    check_calibrator(create(Calibrator, name), risk=risk)


@pytest.mark.parametrize("policy", ["margin", "entropy", "patience", "saturation", "decaying", "at_least", "tempered"])
@pytest.mark.parametrize("name", offramp.names(Calibrator))
def test_contract_with_every_policy_that_can_be_calibrated(name, policy):
    trace = toy_trace(rows=150)
    example = lookup(ExitPolicy, policy).example(trace.depths[:-1], trace.classes)
    if not isinstance(example, lookup(Calibrator, name).takes):
        with pytest.raises(BadArgument, match=type(example).__name__):
            create(Calibrator, name).fit(trace, example, alpha=0.1, delta=0.1, risk="disagreement")
        return
    check_calibrator(create(Calibrator, name), trace, example)


def test_contract_with_too_few_rows():
    found = check_calibrator(create(Calibrator, "fixed_sequence"), toy_trace(rows=10))
    assert found.certificate is None and found.policy == offramp.policy("never")


@pytest.mark.slow
@pytest.mark.parametrize("name", offramp.names(Calibrator))
def test_many_rows_take_seconds(name):
    """200,000 rows of 12 exits in 4 s; a million take five times as long, and may take 10 s on a machine to itself."""
    trace = toy_trace(200_000, depths=tuple(range(1, 13)))
    policy = offramp.policy("confidence", threshold=0.8)
    start = time.perf_counter()
    offramp.calibrate(trace, policy, method=name, alpha=0.1)
    assert time.perf_counter() - start < 4


class Wrong(Calibrator):
    """Certified honestly, then spoilt."""

    def spoil(self, found, trace):
        return found

    def fit(self, trace, policy, *, alpha, delta, risk):
        found = create(Calibrator, "fixed_sequence").fit(trace, policy, alpha=alpha, delta=delta, risk=risk)
        return self.spoil(found, trace)


@dataclass(frozen=True)
class TooBold(Wrong):
    def spoil(self, found, trace):
        return dataclasses.replace(found, policy=offramp.policy("confidence", threshold=0.0))


@dataclass(frozen=True)
class OtherPromise(Wrong):
    def spoil(self, found, trace):
        return dataclasses.replace(found, certificate=dataclasses.replace(found.certificate, alpha=0.01))


@dataclass(frozen=True)
class OtherData(Wrong):
    def spoil(self, found, trace):
        return dataclasses.replace(found, certificate=dataclasses.replace(found.certificate, data_hash="0"))


@dataclass(frozen=True)
class Silent(Wrong):
    def spoil(self, found, trace):
        return Calibration(found.policy)


@dataclass(frozen=True)
class ChangesTrace(Wrong):
    def spoil(self, found, trace):
        trace.stats["top1"].mul_(0.5)
        return found


@dataclass(frozen=True)
class Guesses(Wrong):
    def spoil(self, found, trace):
        return Calibration(offramp.policy("confidence", threshold=float(torch.rand(()))), None, "a guess")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (TooBold, "above alpha"),
        (OtherPromise, "asked was"),
        (OtherData, "does not name the data"),
        (Silent, "note must say why"),
        (ChangesTrace, "changed the trace|differ"),
        (Guesses, "differ"),
    ],
)
def test_a_broken_rule_is_found(cls, message):
    with pytest.raises(ContractError, match=message):
        check_calibrator(cls())
