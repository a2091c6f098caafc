"""The clocks of `bench gate`: they count what ran, leave nothing behind, and the command runs."""

import json

import pytest
import torch
from typer.testing import CliRunner

import offramp
from offramp import cli
from offramp_hf.bench_gate import GateClock, overhead
from offramp_hf.bench_shapes import wide_model


@pytest.fixture
def model():
    return wide_model(64, 6).float()


@pytest.fixture
def exits(model):
    exits = offramp.attach(model, [2, 3, 5], head="speculative", hidden=8)
    for depth in exits:
        torch.nn.init.normal_(exits[depth].exit_gate[-1].weight, std=0.01)
    return exits


def test_overhead_counts_what_ran(model, exits):
    ids = torch.arange(12).view(2, 6)
    found = overhead(model, ids, offramp.policy("speculative_gate", threshold=0.999), 9)
    assert (found["asked"], found["heads"], found["saved"], found["early"]) == (3, 1, 0, 0)
    assert found["agreement"] is None
    parts = found["gate_seconds"], found["head_seconds"], found["block_seconds"]
    assert min(parts) > 0 and found["overhead"] == pytest.approx((parts[0] + parts[1]) / parts[2])
    found = overhead(model, ids, offramp.policy("speculative_gate", threshold=0.0, layers=[3]), 9)
    assert found["asked"] == 1 and found["early"] <= 16 and found["heads"] == 2  # one drafts, one confirms


def marks(exits):
    heads = [exits[d] for d in exits]
    return [(list(h.__dict__), len(h._forward_hooks), len(h._forward_pre_hooks)) for h in heads]


def test_the_clock_leaves_nothing_behind(model, exits):
    before = marks(exits)
    with pytest.raises(KeyboardInterrupt):
        with GateClock(exits).ready():
            assert "gate" in exits[2].__dict__
            raise KeyboardInterrupt
    assert marks(exits) == before


@pytest.mark.slow
def test_command(tmp_path):
    words = ["bench", "gate", "--steps", 3, "--rows", 16, "--prompts", 1, "--new-tokens", 6, "--layers", 2]
    done = CliRunner().invoke(cli.build(), [*map(str, words), "--json", str(tmp_path / "g")])
    assert done.exit_code == 0, done.output
    body = json.loads((tmp_path / "g").read_text())
    assert [row["name"] for row in body["gates"]] == ["all", "offline", "offline + online"]
    assert {"machine", "date", "command"} <= set(body) and len(body["gates"][1]["layers"]) == 2
    assert all(row["block_seconds"] > 0 for row in body["gates"])
