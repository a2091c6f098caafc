"""Every registered policy keeps the contract; and policies that break one rule each are caught by that rule."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import offramp
from offramp._registry import lookup
from offramp.policy import ExitPolicy, ThresholdPolicy
from offramp.testing import ContractError
from offramp.testing.policies import (
    check_ladder,
    check_no_wait,
    check_policy,
    check_rows,
    check_shapes,
    check_value,
    random_evidence,
)

DEPTHS = (2, 4, 6, 8)


@pytest.mark.parametrize("name", offramp.names(ExitPolicy))
@pytest.mark.parametrize("depths", [(3,), DEPTHS])
def test_contract(name, depths):
    made = lookup(ExitPolicy, name)
    if name in ("agreement", "patience") and len(depths) == 1:
        with pytest.raises(offramp.OfframpError, match="could never fire"):
            check_policy(made.example(depths, 7), depths)
    else:
        check_policy(made.example(depths, 7), depths)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("confidence", {"threshold": [0.9, 0.8, 0.7, 0.6]}),
        ("margin", {"threshold": (0.4, 0.3, 0.2, 0.1)}),
        ("entropy", {"threshold": 0.5, "normalised": True}),
        ("saturation", {"threshold": -0.2}),
        ("patience", {"patience": 3}),
        ("patience", {"patience": 2, "tolerance": 3.0}),
        ("agreement", {"threshold": [0.5, 2.0, 3.0, 4.0], "distance": "max", "outputs": (0, 3)}),
        ("agreement", {"threshold": 0.2, "distance": "cosine"}),
        ("jei", {"threshold": 0.7, "recursion": "single"}),
        ("quantile_halting", {"rule": "sample", "seed": 3}),
        ("energy", {"threshold": [-2.0, -3.0, -4.0, -5.0]}),
        ("decaying", {"inner": "saturation", "threshold": [0.1, 0.2, 0.3, 0.4], "length": 4, "tau": 0.0}),
        ("tempered", {"inner": {"policy": "margin", "threshold": 0.3}, "temperature": [2.0, 1.5, 1.0, 0.5]}),
        ("at_least", {"inner": {"policy": "patience", "patience": 1}, "depth": 6}),
    ],
)
def test_contract_with_other_options(name, options):
    check_policy(offramp.policy(name, **options), DEPTHS)


def test_contract_of_nested_combinators():
    inner = {"policy": "all_of", "policies": [{"policy": "patience", "patience": 1}, {"policy": "never"}]}
    check_policy(offramp.policy("any_of", policies=[inner, {"policy": "margin", "threshold": 0.2}, inner]), DEPTHS)


class Base(ExitPolicy):
    """The rules are broken one at a time from here."""

    needs: ClassVar[frozenset[str]] = frozenset({"top1"})

    def step(self, state, seen):
        return seen["top1"] >= 0.5, state


@dataclass(frozen=True)
class Good(Base):
    pass


@dataclass(frozen=True)
class LooksAcross(Base):
    def step(self, state, seen):
        return seen["top1"] >= seen["top1"].nanmean(), state


@dataclass(frozen=True)
class ByPlace(Base):
    def step(self, state, seen):
        return seen.every(True) & (torch.arange(len(seen["top1"])) % 2 == 0), state


@dataclass(frozen=True)
class Random(Base):
    def step(self, state, seen):
        return torch.rand(len(seen["top1"])) > 0.5, state


@dataclass(frozen=True)
class Waits(Base):
    def step(self, state, seen):
        return seen["top1"] >= float(seen["top1"].nansum().clamp(0.5, 0.5)), state


@dataclass(frozen=True)
class Branches(Base):
    def step(self, state, seen):
        return (seen["top1"] >= 0.5 if (seen["top1"] > 2).sum() == 0 else seen.every(False)), state


@dataclass(frozen=True)
class CopiesOut(Base):
    def step(self, state, seen):
        return torch.tensor([v >= 0.5 for v in seen["top1"].tolist()]), state


@dataclass(frozen=True)
class FloatMask(Base):
    def step(self, state, seen):
        return (seen["top1"] >= 0.5).float(), state


@dataclass(frozen=True)
class OneDecision(Base):
    def step(self, state, seen):
        return (seen["top1"] >= 0.5).all(), state


@dataclass(frozen=True)
class FlatState(Base):
    def start(self, batch, device):
        return {"count": torch.zeros(())}


@dataclass(frozen=True)
class LosesRows(Base):
    def start(self, batch, device):
        return {"who": torch.arange(batch)}

    def step(self, state, seen):
        return (seen["top1"] >= 0.5) & (state["who"] == torch.arange(len(state["who"]))), state


@dataclass(frozen=True)
class InPlace(Base):
    def start(self, batch, device):
        return {"count": torch.zeros(batch)}

    def step(self, state, seen):
        state["count"] += 1
        return state["count"] > 2, state


@dataclass(frozen=True)
class Remembers(Base):
    calls: list = field(default_factory=list)

    def step(self, state, seen):
        self.calls.append(1)
        return seen["top1"] >= 0.5, state


@dataclass(frozen=True)
class Backwards(ThresholdPolicy):
    threshold: float = 0.5
    safer: ClassVar[str] = "up"

    def score(self, seen):
        return seen["top1"]

    def grid(self, classes):
        return [0.1, 0.5, 0.9]


@dataclass
class Mutable(Base):
    pass


@dataclass(frozen=True)
class Unsaved(Base):
    """Not registered, so its config names nothing."""


def test_the_parts_pass_a_good_policy():
    evidence = random_evidence(DEPTHS, 7, 12)
    for check in (check_shapes, check_rows, check_no_wait):
        check(Good(), evidence)


@pytest.mark.parametrize(
    ("cls", "check", "message"),
    [
        (LooksAcross, check_rows, "depend on one another"),
        (ByPlace, check_rows, "depend on one another|order of the rows"),
        (Random, check_rows, "deterministic"),
        (LosesRows, check_rows, "order of the rows|leave the batch"),
        (Waits, check_no_wait, "_local_scalar_dense"),
        (Branches, check_no_wait, "waits for the device"),
        (CopiesOut, check_no_wait, "tolist"),
        (FloatMask, check_shapes, "bool mask"),
        (OneDecision, check_shapes, "bool mask"),
        (FlatState, check_shapes, "dimension 0"),
        (InPlace, check_shapes, "in place"),
        (Remembers, check_shapes, "the policy itself"),
    ],
)
def test_a_broken_rule_is_found(cls, check, message):
    with pytest.raises(ContractError, match=message) as caught:
        check(cls(), random_evidence(DEPTHS, 7, 12))
    assert cls.__name__ in str(caught.value)


def test_a_ladder_from_bold_to_safe_is_found():
    with pytest.raises(ContractError, match="safest to boldest"):
        check_ladder(Backwards(), DEPTHS, 7, random_evidence(DEPTHS, 7, 12))


def test_a_mutable_policy_is_found():
    with pytest.raises(ContractError, match="frozen"):
        check_value(Mutable())


def test_a_policy_that_cannot_be_rebuilt_is_found():
    with pytest.raises(offramp.OfframpError, match="Unsaved"):
        check_value(Unsaved())


def test_the_evidence_exercises_policies():
    """A suite over evidence on which nothing ever stops, or everything always does, would pass anything."""
    tops = torch.stack([e["top1"] for e in random_evidence(DEPTHS, 7, 12)], 1)
    assert tops[1].isnan().all() and not tops[2:].isnan().any()
    assert 0.1 < float((tops[2:] >= 0.5).double().mean()) < 0.9
    assert dataclasses.is_dataclass(Good)
