"""The decoder's rows of the overhead benchmark: what is counted as what, and that nothing stays behind."""

import pytest

from offramp import bench_overhead as core
from offramp_hf import plugin
from offramp_hf.bench_overhead import decode
from offramp_hf.decode.direct import Direct


def test_every_token_is_taken_apart():
    before = Direct.run
    half, asked = rows = decode(1, blocks=4, width=64, tokens=5)
    assert [row["executor"] for row in rows] == ["decode"] * 2 and Direct.run is before
    for row in rows:
        assert {"blocks", "heads", "policy", "cache", "rest"} <= set(row["parts_ms"])
        assert {"blocks", "heads", "cache", "rest"} <= set(row["full_parts_ms"])
        assert row["parts_ms"]["blocks"] > 0 and row["full_parts_ms"]["blocks"] > 0
        outside = sum(row["parts_ms"][name] for name in ("policy", "cache", "rest"))
        assert row["overhead"] == pytest.approx(outside / sum(row["full_parts_ms"].values()))
        assert 0 < row["overhead"] < 1 and 0 < row["full_overhead"] < 1
    # every token but the first leaves at half, the newest of the run is finished at the end; asked ones run all
    assert half["saved_blocks"] == pytest.approx(0.5, abs=0.01) and asked["saved_blocks"] == 0
    assert half["realised"] is not None and asked["realised"] is None


def test_only_the_executor_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("offramp_hf.bench_overhead.decode", lambda repeats: [{"executor": "decode"}] * repeats)
    assert plugin.offramp_overhead("denoise", 2, False) is None
    assert plugin.offramp_overhead(None, 2, False) == plugin.offramp_overhead("decode", 2, False)
    assert "decode" in core._known()
