"""The adaptive rule drafts where it pays, rests where it loses, and wakes again."""

import pytest

from offramp._registry import create
from offramp.draft import DraftRule, Look, Outcome, Setup


def start():
    return create(DraftRule, "adaptive").start(Setup((3, 6), 12, (0, 1), head=0.5, wider=0.02))


def rounds(drafter, count, right, sure=0.9):
    """Play `count` rounds of one exit whose drafts are all right or all wrong; return drafts and looks."""
    drafts = looks = 0
    for _ in range(count):
        plan, made = drafter.plan(4), []
        if plan.levels:
            for place in range(plan.length):
                look = Look(plan.levels[0], place, [sure], [1], [True])
                made.append(look)
                look.drafted = drafter.wants(look, [0])
                if not look.drafted:
                    break
        count_of = sum(one.drafted for one in made)
        tokens = [1] * (count_of + 1) if right else [2]
        drafter.learn(Outcome(0, tokens, count_of, len(tokens), made))
        drafts, looks = drafts + count_of, looks + len(made)
    return drafts, looks


def test_what_is_right_is_drafted_at_full_length():
    drafts, _ = rounds(start(), 50, right=True)
    assert drafts > 150


def test_what_is_wrong_rests_ever_longer_and_wakes():
    drafter = start()
    rounds(drafter, 300, right=False)
    _, looks = rounds(drafter, 1000, right=False)
    assert 0 < looks < 300  # mostly asleep
    drafts, _ = rounds(drafter, 1500, right=True)
    assert drafts > 1500  # found out that things are better now


def test_a_policy_that_refuses_is_obeyed():
    assert not start().wants(Look(0, 0, [1.0], [1], [False]), [0])


def test_price_counts_low_blocks_look_and_wider_call():
    assert start().price(0) == pytest.approx((3 + 0.5 + 0.02 * 9) / 12)


def test_no_exit_is_asked_whose_drafts_could_never_pay():
    drafter = start()
    drafter.setup.ragged = 1.8  # rows would come apart
    assert drafter.plan(4).levels == ()
    drafter.setup.ragged = 1.0
    assert drafter.plan(4).levels == (0, 1)
