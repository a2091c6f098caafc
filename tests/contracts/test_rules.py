"""The draft-rule contract over every registered rule, and proof that it can fail."""

from dataclasses import dataclass

import pytest

import offramp
from offramp import _registry
from offramp.draft import Drafter, DraftRule, Plan
from offramp.testing import ContractError
from offramp.testing.rules import check_rule

NAMES = offramp.names(offramp.DraftRule)


def test_the_rules_are_found():
    assert set(NAMES) >= {"adaptive", "confident", "del", "dssd", "fixed", "hybrid", "lookup", "thompson", "tree"}


@pytest.mark.parametrize("name", NAMES)
def test_rule_keeps_the_contract(name):
    check_rule(_registry.create(offramp.DraftRule, name))


class Greedy(Drafter):
    def __init__(self, setup):
        self.levels = (0, 1, 2)

    def plan(self, room):
        return Plan(self.levels, room)


class Long(Greedy):
    def plan(self, room):
        return Plan(self.levels[:0], room + 1)


@pytest.mark.parametrize(("drafter", "message"), [(Greedy, "of the open"), (Long, "in a room of")])
def test_the_contract_can_fail(monkeypatch, drafter, message):
    @dataclass(frozen=True)
    class Broken(DraftRule):
        def start(self, setup):
            return drafter(setup)

    monkeypatch.setitem(_registry._classes, (DraftRule, "broken"), Broken)
    Broken.name = "broken"
    with pytest.raises(ContractError, match=message):
        check_rule(Broken())
