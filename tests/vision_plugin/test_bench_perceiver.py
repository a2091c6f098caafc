"""The bench of latent exits trains every kind, and plain exits on the wider model cost what latent ones do."""

import io

import pytest
from rich.console import Console

from offramp_vision import bench_perceiver


def test_every_kind(monkeypatch):
    monkeypatch.setattr(bench_perceiver, "TRAIN", -64)  # all but so many, which are left to test on
    told = io.StringIO()
    body = bench_perceiver.bench(Console(file=told, width=160), seeds=1, steps=1)
    rows = {(r["name"], tuple(r["widths"])): r for r in body["shapes"]}
    assert list(rows) == [(kind, tuple(widths)) for kind, widths in bench_perceiver.KINDS]
    for (kind, widths), row in rows.items():
        exits = 1 if kind == "none" else 3
        assert len(row["accuracy"]) == len(row["flops"]) == exits and row["flops"] == sorted(row["flops"])
        assert all(0 <= a <= 1 for a in row["accuracy"]) and f"{row['accuracy'][-1]:.1%}" in told.getvalue()
        if widths == bench_perceiver.WIDE:
            latent = rows["perceiver", bench_perceiver.NARROW]["flops"]
            assert row["flops"][:2] == pytest.approx(latent[:2], rel=0.04)
    assert body["command"] == "offramp bench vision --perceiver --repeats 1 --steps 1"
