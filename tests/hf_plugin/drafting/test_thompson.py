"""Thompson sampling: the posterior in closed form, and lengths that follow the acceptance rate."""

import random

import pytest

from offramp._registry import create
from offramp.draft import DraftRule, Look, Outcome, Setup

SETUP = Setup((2, 4), 8, (0, 1))


def start(**options):
    return create(DraftRule, "thompson", **options).start(SETUP)


def outcome(accepted, drafted):
    return Outcome(0, [7] * (accepted + 1), drafted, accepted + 1)


def test_posterior_is_the_closed_form():
    drafter, accepted, rejected = start(a=2.0, b=3.0), 0, 0
    for r, n in [(3, 4), (0, 2), (5, 5), (1, 7)]:
        drafter.learn(outcome(r, n))
        accepted, rejected = accepted + r, rejected + n - r
        assert (drafter.a, drafter.b) == (2.0 + accepted, 3.0 + rejected)
    drafter.learn(outcome(0, 0))  # a round without drafts says nothing
    assert (drafter.a, drafter.b) == (2.0 + accepted, 3.0 + rejected)


def test_forgetting_is_a_geometric_sum_over_the_prior():
    drafter = start(forgetting=0.5)
    for r, n in [(4, 4), (0, 4), (2, 4)]:
        drafter.learn(outcome(r, n))
    assert drafter.a == 1 + 4 * 0.25 + 0 * 0.5 + 2
    assert drafter.b == 1 + 0 * 0.25 + 4 * 0.5 + 2


def lengths(drafter, rate, rounds, seed):
    """Mean number of drafts per round when each is accepted with probability `rate`."""
    chance, total = random.Random(seed), 0
    for _ in range(rounds):
        plan, drafts = drafter.plan(12), 0
        while drafts < plan.length:
            drafts += 1
            if not drafter.goes_on(Look(0, drafts - 1, [0.5], [1], [True]), [0]):
                break
        good = next((i for i in range(drafts) if chance.random() > rate), drafts)
        drafter.learn(outcome(good, drafts))
        total += drafts
    return total / rounds


@pytest.mark.parametrize("priced", [False, True])
def test_length_adapts_when_the_regime_changes(priced):
    drafter = start(forgetting=0.9, priced=priced)
    easy = lengths(drafter, 0.95, 150, 1)
    hard = lengths(drafter, 0.1, 150, 2)
    again = lengths(drafter, 0.95, 150, 3)
    assert easy > 2.5 * hard and again > 2.5 * hard and hard < 2


def test_drafts_that_do_not_pay_are_left_out():
    dear = create(DraftRule, "thompson").start(Setup((4,), 8, (0,), head=2.0))  # a draft costs 6 of 8 blocks
    for _ in range(20):
        dear.learn(outcome(4, 5))
    assert lengths(dear, 0.8, 200, 1) < 1.5  # two of them are kept with 0.64
