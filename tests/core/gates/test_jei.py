"""Four statistics and a bias per exit, by hand."""

import math

import pytest
import torch

import offramp
from offramp.gating import build_gate
from offramp.kernels.confidence import confidence

NEEDS = {"top1", "entropy", "margin", "sharpened"}


def test_the_statistics_by_hand():
    logits = torch.tensor([[math.log(4), math.log(2), math.log(2)], [0.0, float("-inf"), float("-inf")]])
    found = confidence(logits, NEEDS)
    p, q = (0.5, 0.25, 0.25), (4 / 6, 1 / 6, 1 / 6)  # q: p squared, normalised
    assert found["top1"].tolist() == pytest.approx([0.5, 1.0]) and found["margin"].tolist() == pytest.approx([0.25, 1])
    assert found["entropy"].tolist() == pytest.approx([-sum(v * math.log(v) for v in p), 0], abs=1e-6)
    assert found["sharpened"].tolist() == pytest.approx([-sum(v * math.log(v) for v in q), 0], abs=1e-6)


def test_the_gate_by_hand():
    gate, name, options = build_gate("jei", 16, 3)
    assert (name, options) == ("jei", {}) and sum(p.numel() for p in gate.parameters()) == 3 * 5
    with torch.no_grad():
        gate.weight[1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        gate.bias[1] = 0.5
    stats = {"top1": 0.4, "entropy": 0.3, "margin": 0.2, "sharpened": 0.1}
    stats = {k: torch.tensor([v]) for k, v in stats.items()}
    odds = gate.log_odds(torch.zeros(1, 16), 1, None, stats)
    assert odds.item() == pytest.approx(0.4 + 0.6 + 0.6 + 0.4 + 0.5, abs=1e-6)
    assert gate(torch.zeros(1, 16), 2, None, stats).item() == pytest.approx(1 / 4)  # untrained, all places alike


@torch.no_grad()
def test_it_reads_the_heads_own_statistics(model):
    exits = offramp.attach(model, [2, 4], gate="jei")
    exits.gate_module.weight.normal_()
    x = torch.randn(9, 3, 8)
    trace = offramp.record(model, x, logits=True)
    for k in range(2):
        stats = confidence(trace.logits[:, k], NEEDS)
        wanted = exits.gate_module(torch.zeros(9, 16), k, None, stats)
        assert torch.allclose(trace.stats["jei"][:, k], wanted, atol=1e-6)
