"""What the clock makes of measurements: the setup follows what is measured, and no single moment decides for good."""

from offramp.draft import Setup
from offramp_hf.decode.clock import ENOUGH, Clock


def clock():
    return Clock(Setup((2, 4), 8, (0, 1), 0.3, 0.04))


def test_wider_tokens_are_learned():
    found = clock()
    for _ in range(50):
        found.window(8e-3, 0, 8, 1)
        found.window(8e-3 * (1 + 0.2 * 3), 0, 8, 4)
        found.round(21e-3, None)
    assert abs(found.setup.wider - 0.2) < 0.01


def test_a_disturbed_call_does_not_end_drafting():
    """Another program took the processor for a second while one wide call ran: a token still costs less than a call."""
    found = clock()
    for _ in range(ENOUGH):
        found.window(8e-3, 0, 8, 1)
        found.round(8e-3, None)
    for seconds in (1.0, 2.0):
        found.window(seconds, 0, 8, 2)
        found.round(seconds, None)
    assert found.setup.wider < 0.3


def test_what_looks_cost_is_in_blocks():
    found = clock()
    for _ in range(4 * ENOUGH):
        found.window(8e-3, 0, 8, 1)
        found.round(8e-3, [])
        found.look(2e-3)
        found.round(2e-3, None)
    assert abs(found.setup.head - 2.0) < 0.1


def test_rows_of_different_length_have_a_price_until_they_have_it():
    found = clock()
    for ragged, seconds in ((False, 4e-3), (True, 7e-3)):
        for _ in range(2 * ENOUGH):
            found.begin(8, ragged, True)
            found.window(seconds, 0, 8, 1)
            found.round(seconds, [])
        assert (found.setup.ragged > 1.2) == (not ragged)
    assert found.setup.ragged == 1.0
    found.begin(8, False, True)
    assert abs(found.setup.ragged - 1.75) < 0.01
    found.begin(1, False, False)
    assert found.setup.ragged == 1.0


def test_each_kind_of_batch_has_its_prices():
    found = clock()
    for _ in range(50):
        found.begin(8, False, False)
        found.window(8e-3, 0, 8, 1)
        found.window(8e-3 * 1.5, 0, 8, 2)
        found.round(20e-3, None)
        found.begin(1, False, False)
        found.window(2e-3, 0, 8, 1)
        found.window(2e-3 * 1.1, 0, 8, 2)
        found.round(5e-3, None)
    assert abs(found.setup.wider - 0.1) < 0.01
    found.begin(8, False, False)
    assert abs(found.setup.wider - 0.5) < 0.02


def test_a_round_that_is_dropped_teaches_nothing():
    found = clock()
    before = found.setup.wider, found.setup.head
    for _ in range(4 * ENOUGH):
        found.window(8e-3, 0, 8, 1)
        found.window(60e-3, 0, 8, 2)
        found.look(30e-3)
        found.drop()
    found.round(1e-3, None)
    assert (found.setup.wider, found.setup.head) == before


def test_checking_drafts_of_the_text_has_a_price():
    found = clock()
    for _ in range(16 * ENOUGH):
        found.window(8e-3, 0, 8, 1)
        found.round(9e-3, [])
        found.window(8.4e-3, 0, 8, 2)
        found.round(11e-3, None)
    block = 9e-3 / 8
    assert abs(found.setup.given - (11e-3 / block - 8 * (1 + found.setup.wider))) < 0.05 < found.setup.given


def test_a_slower_machine_changes_no_price():
    """Looks are measured while another program halves the speed, plain rounds before and after: in blocks all is equal.
    """
    found = clock()
    for slow in (1, 2, 1):
        for _ in range(4 * ENOUGH):
            found.window(8e-3 * slow, 0, 8, 1)
            if slow == 2:
                found.look(2e-3 * slow)
            found.round((8e-3 + 2e-3 * (slow == 2)) * slow, [] if slow == 1 else None)
    assert abs(found.setup.head - 2.0) < 0.2
