"""The overhead benchmark: what it calls saved, and that the parts it names are the whole."""

import time

import pytest

from offramp.bench_overhead import Clock, measure, single_pass
from offramp.errors import UnknownName


def test_rows_leave_and_the_parts_are_measured():
    half, spread = rows = single_pass(8, 32, 16, 4, 1)
    assert half["saved_blocks"] == 0.5 and 0 < spread["saved_blocks"] < 0.75
    for row in rows:
        assert set(row["parts_ms"]) == {"blocks", "heads", "policy", "rest"} and min(row["parts_ms"].values()) > 0
        assert set(row["full_parts_ms"]) == {"blocks", "heads", "rest"} and row["executor"] == "single_pass"
        assert row["full_ms"] > 0 and row["realised"] is not None and not row["compiled"]
        spent, full = row["parts_ms"], row["full_parts_ms"]
        assert row["overhead"] == pytest.approx((spent["policy"] + spent["rest"]) / sum(full.values()))
        assert row["full_overhead"] == pytest.approx(full["rest"] / sum(full.values()))


def test_the_clock_leaves_no_trace():
    class Part:
        def run(self):
            return 1

    part, clock = Part(), Clock()
    before = dict(vars(Part))
    with pytest.raises(KeyError), clock.on([("a", Part, "run"), ("b", part, "run")]):
        assert part.run() == 1 and set(clock.spent) == {"a", "b"}
        raise KeyError
    assert dict(vars(Part)) == before and not vars(part)


def test_an_unknown_executor_is_said():
    with pytest.raises(UnknownName, match="did you mean 'single_pass'"):
        measure("singlepass", 1, False, depth=4, width=8, batch=4, tokens=1)


def test_a_part_inside_another_counts_once():
    clock = Clock()
    inner = clock.wrap("inner", lambda: time.sleep(0.05))

    def both():
        inner()
        time.sleep(0.02)
        inner()

    clock.wrap("outer", both)()
    assert clock.spent["inner"] >= 0.1 and 0.02 <= clock.spent["outer"] < 0.1
