"""What leaving costs: blocks counted, operations by hand, seconds that follow them, weights by hand."""

import time

import pytest
import torch

import offramp
from offramp import costs
from offramp.errors import UnknownName


@pytest.fixture
def exits(model):
    return offramp.attach(model, [2, 4])


def test_blocks_are_the_default(model, exits, x):
    trace = offramp.record(model, x)
    assert trace.costs.tolist() == [2, 4, 6] and trace.unit == "blocks"


def test_operations_by_hand(model, exits, x):
    """Rows of 3 tokens, width 16: embedding 8 -> 16, blocks 16 -> 32 -> 16, readout and heads 16 -> 5 on one token."""
    trace = offramp.record(model, x, costs="flops")
    embed, block, head = 2 * 3 * 8 * 16, 2 * 3 * 2 * 16 * 32, 2 * 16 * 5
    wanted = [embed + 2 * block + head, embed + 4 * block + 2 * head, embed + 6 * block + 3 * head]
    assert trace.costs.tolist() == wanted and trace.unit == "flops"


def test_seconds_follow_what_the_blocks_take(model, exits, x, monkeypatch):
    """The third block is made to take 5 ms per call of 7 rows."""
    block = model.blocks[2]
    before = block.forward

    def slow(*args):
        time.sleep(0.005)
        return before(*args)

    monkeypatch.setattr(block, "forward", slow)
    found = offramp.record(model, x, costs="seconds").costs
    assert 0 < found[0] < 0.005 / 7 <= found[1] < found[2] < 0.05


def test_measuring_leaves_no_mark(model, exits, x, marks):
    before = marks(model)
    for unit in costs.UNITS:
        costs.measure(exits, x, unit)
    assert marks(model) == before


def test_a_budget_in_operations(model, exits):
    data = torch.randn(2000, 3, 8)
    trace = offramp.record(model, data, costs="flops")
    budget = float(trace.costs.mean())
    cal = offramp.calibrate(trace[:1000], "confidence", method="budget", budget=budget)
    assert offramp.simulate(trace[:1000], cal).cost_mean == pytest.approx(budget, rel=2e-3)
    assert "flops" in cal.note


def test_weights_of_a_model_cut_at_each_exit(model, exits):
    """Bytes: embedding and readout stay; blocks deeper than the exit and the later head go."""

    def size(*modules):
        return 4 * len({id(p) for m in modules for p in m.parameters()}) and 4 * sum(
            p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values()
        )

    always = (model.embed, model.norm, model.head)
    wanted = [
        size(*always, *model.blocks[:2], exits[2]),
        size(*always, *model.blocks[:4], exits[2], exits[4]),
        size(*always, *model.blocks, exits[2], exits[4]),
    ]
    assert costs.weights(exits) == tuple(wanted) and wanted[0] < wanted[1] < wanted[2]
    cal = offramp.calibrate(
        offramp.record(model, torch.randn(200, 3, 8)),
        "confidence",
        method="search",
        memory=wanted[1],
        sizes=costs.weights(exits),
    )
    assert cal.policy.last == 4


def test_an_unknown_unit_is_refused(model, exits, x):
    with pytest.raises(UnknownName, match="did you mean 'flops'"):
        offramp.record(model, x, costs="flop")
