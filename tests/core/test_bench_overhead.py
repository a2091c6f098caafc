"""The overhead benchmark: what it calls saved, and that the parts it names are the whole."""

import time

from offramp.bench_overhead import Clock, single_pass


def test_rows_leave_and_the_parts_are_measured():
    body = single_pass(8, 32, 16, 4, 1)
    half, spread = body["rows"]
    assert half["saved_blocks"] == 0.5 and 0 < spread["saved_blocks"] < 0.75
    for row in body["rows"]:
        assert set(row["parts_ms"]) == {"blocks", "heads", "policy", "rest"} and min(row["parts_ms"].values()) > 0
        assert row["full_ms"] > 0 and row["realised"] is not None


def test_a_part_inside_another_counts_once():
    clock = Clock()
    inner = clock.wrap("inner", lambda: time.sleep(0.05))

    def both():
        inner()
        time.sleep(0.02)
        inner()

    clock.wrap("outer", both)()
    assert clock.spent["inner"] >= 0.1 and 0.02 <= clock.spent["outer"] < 0.1
