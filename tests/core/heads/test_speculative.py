"""The gate beside a readout: its numbers by hand, what trains which part, what is saved, and what is refused."""

import math

import pytest
import torch

import offramp
from offramp.errors import BadArgument, UnknownName
from offramp.fit import trainable
from offramp.head import ask_in_turn, gated
from offramp.testing.heads import check_head
from offramp.testing.toy import ToyModel


@pytest.fixture
def model():
    return ToyModel().eval()


@pytest.fixture
def data():
    return torch.randn(200, 3, 8)


def softmax(values):
    top = max(values)
    parts = [math.exp(v - top) for v in values]
    return [p / sum(parts) for p in parts]


@pytest.mark.parametrize("inner", ["tied", "shared", "translator"])
def test_contract_with_every_readout(inner):
    check_head("speculative", inner=inner, candidates=3, hidden=8)


@torch.no_grad()
def test_features_by_hand(model, data):
    """Logits of the first exit's three best classes, their softmax, and its change since the exit before."""
    exits = offramp.attach(model, [1, 3, 4], head="speculative", candidates=3, hidden=8)
    states = exits.backbone.observe(data[:5], exits.at).hidden
    heads = gated(exits)
    carried = heads[0].draft(states[0])
    p = carried["p"]
    assert not p.any() and p.shape == (5, 3)
    before = [[0.0] * 3] * 5
    for head, hidden in zip(heads, states, strict=True):
        found, p = head.statistics(hidden, carried["candidates"], p)
        for row in range(5):
            best = sorted(range(5), key=lambda c, row=row: -float(heads[0](states[0])[row, c]))[:3]
            z = [float(head(hidden)[row, c]) for c in best]
            now = softmax(z)
            wanted = [*z, *now, *(a - b for a, b in zip(now, before[row], strict=True))]
            assert found[row].tolist() == pytest.approx(wanted, abs=1e-5)
            before = [*before[:row], now, *before[row + 1 :]]


def test_asking_in_turn_is_asking_one_by_one(model, data):
    exits = offramp.attach(model, [1, 3, 4], head="speculative", candidates=3, hidden=8)
    states, heads = exits.backbone.observe(data[:5], exits.at).hidden, gated(exits)
    for head in heads:
        torch.nn.init.normal_(head.exit_gate[-1].weight)
    together, candidates = ask_in_turn(heads, states, heads[0](states[0]))
    carried = heads[0].draft(states[0])
    first, p = heads[0].gate(states[0], carried["candidates"], carried["p"])
    second, p = heads[1].gate(states[1], carried["candidates"], p)
    assert torch.equal(together[0], first) and torch.equal(together[1], second)
    assert torch.equal(candidates, carried["candidates"])


def test_the_gate_loss_trains_gates_alone_and_distilling_the_readout_alone(model, data):
    exits = offramp.attach(model, [2, 4], head="speculative", candidates=2, hidden=8)
    assert not exits[2].trained

    def parts():
        state = {k: v.clone() for k, v in model.state_dict().items()}
        return ({k: v for k, v in state.items() if ("exit_gate" in k) is gate} for gate in (True, False))

    def same(one, other):
        return [torch.equal(one[k], other[k]) for k in one]

    gates, rest = parts()
    offramp.fit(model, data, loss="speculative_gate", steps=5, rows=64, weight_decay=0.1, progress=False)
    gates_after, rest_after = parts()
    assert all(same(rest, rest_after)) and not any(same(gates, gates_after)) and exits[2].trained
    offramp.fit(model, data, loss="distill", steps=5, rows=64, weight_decay=0.1, progress=False)
    gates_last, rest_last = parts()
    assert all(same(gates_after, gates_last)) and not all(same(rest_after, rest_last))
    assert len(trainable(exits)) == 2 * 6  # a norm and two layers, each with a bias


def test_a_loss_that_has_nothing_to_train_says_so(model, data):
    offramp.attach(model, [2], head="speculative", candidates=2, inner="shared")
    with pytest.raises(BadArgument, match="no weights of its own to train here"):
        offramp.fit(model, data, loss="distill", steps=1, progress=False)
    with pytest.raises(BadArgument, match="teaches heads or gates about a model as it is; leave backbone=True out"):
        offramp.fit(model, data, loss="speculative_gate", backbone=True, steps=1, progress=False)
    assert offramp.fit(model, data, loss="speculative_gate", steps=2, rows=64, progress=False).losses


def test_gates_are_saved_and_detaching_is_exact(model, data, tmp_path):
    before, keys = model(data), list(model.state_dict())
    options = {"candidates": 2, "hidden": 8, "inner": "translator", "options": {"rank": 3}}
    exits = offramp.attach(model, [2, 4], head="speculative", **options)
    offramp.fit(model, data, loss="speculative_gate", steps=5, rows=64, progress=False)
    trace = offramp.record(model, data)
    exits.save(tmp_path)
    exits.detach()
    assert list(model.state_dict()) == keys and torch.equal(model(data), before)
    loaded = offramp.load(model, tmp_path)
    again = offramp.record(model, data).stats["gate"]
    assert loaded[2].trained and torch.equal(again[:, :-1], trace.stats["gate"][:, :-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates must be a whole number above 0, not 0"),
        ({"candidates": 6}, "candidates=6 of 5 classes"),
        ({"hidden": 1.5}, "hidden must be a whole number above 0, not 1.5"),
        ({"inner": "linear"}, "inner='linear' does not read with one matrix .*choose inner='tied'"),
        ({"inner": "speculative"}, "inner='speculative' does not read with one matrix"),
        ({"inner": "tide"}, "no ExitHead is called 'tide'"),
        ({"inner": "translator", "options": {"rang": 3}}, "translator has no option 'rang'; did you mean 'rank'"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(model, options, message):
    keys = list(model.state_dict())
    with pytest.raises((BadArgument, UnknownName), match=message):
        offramp.attach(model, [2], head="speculative", **options)
    assert list(model.state_dict()) == keys and "exits" not in model._modules


def test_missing_gates_name_the_line_to_write(model, data):
    with offramp.attach(model, [2, 4]):
        for act in (
            lambda: offramp.enable(model, "speculative_gate"),
            lambda: offramp.fit(model, data, loss="speculative_gate", steps=1, progress=False),
        ):
            with pytest.raises(BadArgument, match=r"heads 'tied' have no gates.*at=\[2, 4\], head='speculative'\)"):
                act()
        with pytest.raises(BadArgument, match="does not hold gate.*loss='speculative_gate'"):
            offramp.simulate(offramp.record(model, data[:4]), "speculative_gate")
    offramp.attach(model, [2, 4], head="speculative", candidates=2)
    with pytest.raises(BadArgument, match=r"gates at \[2, 4\] are untrained.*offramp.fit\(model, ids, loss="):
        offramp.enable(model, "speculative_gate")
    assert "_offramp_run" not in model.__dict__
