"""The denoiser's rows of the overhead benchmark."""

import pytest

from offramp_diffusers import plugin
from offramp_diffusers.bench_overhead import denoise


def test_a_call_is_taken_apart():
    rows = denoise(1, False, width=64, side=8)
    assert [row["case"] for row in rows] == ["by schedule", "at an exit"]
    for row in rows:
        assert set(row["parts_ms"]) == {"blocks", "policy", "rest"} and set(row["full_parts_ms"]) == {"blocks", "rest"}
        assert row["saved_blocks"] == 0.5 and row["realised"] is not None and not row["compiled"]
        assert row["parts_ms"]["blocks"] < row["full_parts_ms"]["blocks"]


def test_only_the_executor_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("offramp_diffusers.bench_overhead.denoise", lambda *given: [{"given": given}])
    assert plugin.offramp_overhead("decode", 2, True) is None
    for executor in (None, "denoise"):
        assert plugin.offramp_overhead(executor, 2, True) == [{"given": (2, True)}]


@pytest.mark.slow
def test_compiled_blocks_stop_at_the_same_depth():
    plain, compiled = denoise(1, True, width=64, side=8)[::2]
    assert compiled["compiled"] and compiled["saved_blocks"] == plain["saved_blocks"]
