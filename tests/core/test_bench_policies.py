"""Policies calibrated, simulated and measured: what runs is what the trace says."""

from types import SimpleNamespace

import pytest
import torch

import offramp
from offramp.bench_policies import calibrations, on_the_clock, policy_row
from offramp.cli import console
from offramp.testing.toy import ToyModel

HOW = SimpleNamespace(risk="disagreement", alpha=0.2, delta=0.1)


@pytest.fixture
def fitted():
    torch.manual_seed(0)
    model = ToyModel().eval()
    exits = offramp.attach(model, [2, 4], head="linear")
    x = torch.randn(300, 3, 8)
    data = {"x": x, "labels": torch.arange(300) % 5}
    offramp.fit(model, x, steps=60, lr=1e-2, progress=False)
    return exits, data, offramp.record(model, data, batch_size=300)


def test_rows_hold_what_was_simulated_and_what_ran(fitted):
    exits, data, trace = fitted
    found = calibrations(trace, HOW, ("confidence", "never", "patience"))
    rows = [policy_row(name, made, trace, HOW.risk) for name, made in found.items()]
    batches = [{k: v[i : i + 64] for k, v in data.items()} for i in range(0, 300, 64)]
    clock = on_the_clock(exits, rows, found, batches, trace, console())
    assert clock["calls"] == 5 and clock["batch"] == 64
    bold, never = rows[0], rows[1]
    assert bold["certified"] and bold["saved"] > 0.1 and bold["risk"] <= HOW.alpha and not bold["moved"]
    assert sum(bold["exits"].values()) == 300 and bold["live_accuracy"] == pytest.approx(bold["accuracy"])
    assert bold["bound"] == pytest.approx(1 / (1 - bold["saved"]))
    assert never["exits"] == {"6": 300} and never["realised"] is None
    assert never["live_accuracy"] == clock["full_accuracy"]


def test_what_cannot_be_certified_says_why_and_is_not_run(fitted):
    exits, data, trace = fitted
    found = calibrations(trace[torch.arange(20)], SimpleNamespace(risk="disagreement", alpha=0.01, delta=0.01))
    assert "position_schedule" not in found and {"confidence", "never"} <= set(found)
    row = policy_row("confidence", found["confidence"], trace, "disagreement")
    assert not row["certified"] and "rows are needed" in row["note"]
    on_the_clock(exits, [row], found, [data], trace, console())
    assert "speedup" not in row
