"""The gate over two consecutive states: what it sees at each exit, its options, and what is refused."""

import json

import pytest
import torch
from torch.nn.functional import layer_norm

import offramp
from offramp._registry import lookup
from offramp.errors import BadArgument, DamagedFile, UnknownName
from offramp.gate import ExitGate
from offramp.gating import build_gate


def turned(**options):
    gate = build_gate({"gate": "lambda", **options}, 16, 3)[0]
    with torch.no_grad():
        gate.out.weight.normal_()
    return gate


def test_untrained_it_says_a_tenth():
    gate = build_gate("lambda", 16, 3)[0]
    assert torch.allclose(gate(torch.randn(5, 16), 1, torch.randn(5, 16)), torch.full((5,), 0.1), atol=1e-5)


@torch.no_grad()
def test_it_is_three_layers_over_both_states():
    gate = turned(hidden=7)
    now, before = torch.randn(5, 16), torch.randn(5, 16) * 3 + 2
    seen = torch.cat([layer_norm(now, (16,)), layer_norm(before, (16,))], -1)
    for layer in (gate.body[0], gate.body[2], gate.body[4]):
        seen = torch.tanh(seen @ layer.weight.T + layer.bias)
    assert seen.shape == (5, 7)
    assert torch.allclose(gate.log_odds(now, 1, before), (seen @ gate.out.weight.T + gate.out.bias)[:, 0], atol=1e-6)
    first = gate.log_odds(now)
    assert torch.allclose(first, gate.log_odds(now, 2, torch.zeros(5, 16)))  # a state of zeros stays one
    assert not torch.allclose(first, gate.log_odds(now, 1, before))


@torch.no_grad()
def test_at_every_exit_it_sees_the_exit_before(model):
    exits = offramp.attach(model, [1, 3, 4], gate={"gate": "lambda", "hidden": 8})
    exits.gate_module.out.weight.normal_()
    x = torch.randn(9, 3, 8)
    states = exits.backbone.observe(x, exits.at).hidden
    trace = offramp.record(model, x, batch_size=4)
    for k in range(3):
        wanted = exits.gate_module(states[k], k, states[k - 1] if k else None)
        assert torch.allclose(trace.stats["lambda"][:, k], wanted, atol=1e-6)


def test_options_are_saved_and_loaded(model, tmp_path):
    with offramp.attach(model, [2, 4], gate={"gate": "lambda", "hidden": 9}) as exits:
        torch.nn.init.normal_(exits.gate_module.out.weight)
        weights = {k: v.clone() for k, v in exits.gate_module.state_dict().items()}
        exits.save(tmp_path)
    body = json.loads((tmp_path / "exits.json").read_text())
    assert body["gate"] == "lambda" and body["gate_config"] == {"hidden": 9}
    again = offramp.load(model, tmp_path)
    assert again.gate_config == {"hidden": 9} and isinstance(again.gate_module, lookup(ExitGate, "lambda"))
    assert all(torch.equal(again.gate_module.state_dict()[k], v) for k, v in weights.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate_config": [3]}, DamagedFile, "gate_config is .3., not a dict"),
        ({"gate_config": {"hiden": 9}}, UnknownName, "did you mean 'hidden'"),
        ({"gate_config": {"hidden": 8}}, DamagedFile, "has shape"),
    ],
)
def test_a_damaged_directory_leaves_the_model_alone(model, marks, tmp_path, change, error, message):
    with offramp.attach(model, [2, 4], gate={"gate": "lambda", "hidden": 9}) as exits:
        exits.save(tmp_path)
    body = json.loads((tmp_path / "exits.json").read_text())
    (tmp_path / "exits.json").write_text(json.dumps({**body, **change}))
    before = marks(model)
    with pytest.raises(error, match=message):
        offramp.load(model, tmp_path)
    assert marks(model) == before


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ({"gate": "lambda", "hidden": 0}, BadArgument, "hidden must be a whole number above 0"),
        ({"gate": "lambda", "width": 4}, UnknownName, "gate 'lambda'"),
        ({"name": "lambda"}, BadArgument, "names no gate; give one of jei, lambda"),
        (7, BadArgument, "gate=7 names no gate"),
        ({"gate": "lamda"}, UnknownName, "did you mean 'lambda'"),
    ],
)
def test_what_names_no_gate(model, marks, gate, error, message):
    before = marks(model)
    with pytest.raises(error, match=message):
        offramp.attach(model, [2, 4], gate=gate)
    assert marks(model) == before
