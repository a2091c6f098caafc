"""Every registered loss keeps the contract; and losses that break one rule each are caught."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

import offramp
from offramp._registry import create, lookup
from offramp.loss import WEIGHTINGS, Loss
from offramp.testing import ContractError
from offramp.testing.losses import check_loss


@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
@pytest.mark.parametrize("name", offramp.names(Loss))
def test_contract(name, weighting):
    takes = "weighting" in inspect.signature(lookup(Loss, name)).parameters
    check_loss(create(Loss, name, **({"weighting": weighting} if takes else {})))


@pytest.mark.parametrize("options", [{"temperature": 3.0}, {"top_k": 2}, {"top_k": 100, "temperature": 0.5}])
def test_contract_of_distill_with_options(options):
    check_loss(create(Loss, "distill", **options))


@dataclass(frozen=True)
class Mean(Loss):
    weighting: str = "uniform"

    def each(self, predictions, final, targets):
        return [functional.cross_entropy(p, final.detach().argmax(-1)) for p in predictions]


@dataclass(frozen=True)
class ThroughTeacher(Mean):
    def each(self, predictions, final, targets):
        return [functional.mse_loss(p, final) for p in predictions]


@dataclass(frozen=True)
class Mixed(Mean):
    def each(self, predictions, final, targets):
        total = sum(super().each(predictions, final, targets))
        return [total for _ in predictions]


@dataclass(frozen=True)
class Uphill(Mean):
    def each(self, predictions, final, targets):
        return [-part for part in super().each(predictions, final, targets)]


@dataclass(frozen=True)
class FirstRow(Mean):
    def each(self, predictions, final, targets):
        return [functional.cross_entropy(p[:1], final.detach().argmax(-1)[:1]) for p in predictions]


@dataclass(frozen=True)
class PerRow(Mean):
    def each(self, predictions, final, targets):
        return [functional.cross_entropy(p, final.detach().argmax(-1), reduction="none") for p in predictions]


@dataclass(frozen=True)
class Noisy(Mean):
    def each(self, predictions, final, targets):
        return [part + torch.rand(()) for part in super().each(predictions, final, targets)]


def test_a_good_loss_passes():
    check_loss(Mean())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (ThroughTeacher(), "detach it"),
        (Mixed(), "alone"),
        (Uphill(), "agree neither"),
        (FirstRow(), "order of the rows"),
        (PerRow(), "finite scalars"),
        (Noisy(), "two calls differ"),
        (Mean(weighting="sometimes"), "weighting"),
    ],
)
def test_a_broken_rule_is_found(loss, message):
    with pytest.raises(ContractError, match=message):
        check_loss(loss)
