"""The gate: on the model and off again, in the evidence, trained, saved and loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import offramp
from offramp import checkpoint
from offramp.attach import find
from offramp.errors import BadArgument, DamagedFile, NotAttached, UnknownName
from offramp.fit import trainable
from offramp.testing.toy import ToyModel


@pytest.fixture
def deep():
    """A model whose blocks change the answer, so that exits are right on some rows only."""
    model = ToyModel().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.mul_(12)
    return model


def turn(exits):
    """A gate that says different things."""
    with torch.no_grad():
        exits.gate_module.weight.normal_()
        exits.gate_module.bias.fill_(0.3)
    return exits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_it_says_one_half_whatever_the_state(dtype):
    model = ToyModel().to(dtype)
    exits = offramp.attach(model, [2, 4], gate="linear")
    gate = exits.gate_module
    assert gate.weight.dtype == dtype and exits.gate == "linear" and "gate='linear'" in repr(exits)
    assert torch.equal(gate(torch.randn(3, 2, 16, dtype=dtype)), torch.full((3, 2), 0.5))


def test_attach_and_detach_are_exact(model, marks, x):
    full, keys, before = model(x), list(model.state_dict()), marks(model)
    exits = offramp.attach(model, [2, 4], gate="linear")
    assert [k for k in model.state_dict() if k not in keys and "gate" in k] == ["exits.gate.weight", "exits.gate.bias"]
    assert torch.equal(model(x), full)
    exits.detach()
    assert marks(model) == before and list(model.state_dict()) == keys
    with pytest.raises(NotAttached):
        _ = exits.gate_module


def test_an_unknown_gate_changes_nothing(model, marks):
    before = marks(model)
    with pytest.raises(UnknownName, match="no gate is called 'linaer'; did you mean 'linear'"):
        offramp.attach(model, [2], gate="linaer")
    assert marks(model) == before


def test_rows_leave_where_the_gate_says_so_and_no_head_runs_for_the_others(model):
    exits = turn(offramp.attach(model, [2, 4], gate="linear"))
    x, rows = torch.randn(40, 3, 8), []
    for depth in exits:
        exits[depth].register_forward_hook(lambda m, args, out: rows.append(len(out)))
    states = exits.backbone.observe(x, (2, 4)).hidden
    said = torch.stack([exits.gate_module(h) for h in states], 1).detach()
    first = (said >= 0.6).float().argmax(1)
    wanted = torch.where((said >= 0.6).any(1), torch.tensor([2, 4])[first], 6)
    with offramp.enable(model, "gate", threshold=0.6) as run, torch.no_grad():
        model(x)
    assert torch.equal(run.stats.last_depths, wanted) and len(wanted.unique()) == 3
    assert rows == [int((wanted == 2).sum()), int((wanted == 4).sum())]


def test_a_trace_holds_it_and_simulates_as_the_live_run(model):
    turn(offramp.attach(model, [2, 4], gate="linear"))
    x = torch.randn(60, 3, 8)
    trace = offramp.record(model, x, batch_size=7)
    assert trace.stats["agrees"].shape == (60, 3) and (trace.stats["agrees"][:, -1] == 1).all()
    outcome = offramp.simulate(trace, "gate", threshold=[0.6, 0.4])
    with offramp.enable(model, "gate", threshold=[0.6, 0.4]) as run, torch.no_grad():
        model(x)
    assert torch.equal(outcome.depths, run.stats.last_depths) and len(outcome.depths.unique()) > 1


def test_without_a_gate_the_error_names_the_line_to_write(model, x):
    exits = offramp.attach(model, [2, 4])
    line = r"attach\(model, at=\[2, 4\], head='tied', gate=\"linear\"\)"
    with pytest.raises(NotAttached, match=line):
        offramp.enable(model, "gate", threshold=0.5)
    with pytest.raises(NotAttached, match=line):
        offramp.fit(model, x, loss="gate", progress=False)
    trace = offramp.record(model, x)
    assert "agrees" not in trace.stats
    with pytest.raises(BadArgument, match=r"does not hold agrees.*gate='linear'.*loss='gate'"):
        offramp.simulate(trace, "gate", threshold=0.5)
    assert not run_of(exits)


def run_of(exits):
    return exits.model.__dict__.get("_offramp_run")


@pytest.mark.parametrize("threshold", [0.0, 1.1, -0.5, [0.5, 0.0]])
def test_a_threshold_that_says_nothing(threshold):
    with pytest.raises(BadArgument, match=r"gate: threshold .* is outside \]0, 1\]"):
        offramp.policy("gate", threshold=threshold)


@pytest.mark.parametrize("head", ["tied", "shared"])
def test_it_learns_where_exits_agree(deep, head):
    exits = offramp.attach(deep, [2, 4], head=head, gate="linear")
    data = torch.randn(600, 3, 8)
    before = {k: v.clone() for k, v in deep.state_dict().items()}
    report = offramp.fit(deep, data, loss="gate", steps=200, lr=3e-2, progress=False)
    changed = {k for k, v in deep.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"exits.gate.weight", "exits.gate.bias"}
    assert report.before == report.agreement and report.losses[-1] < report.losses[0] == pytest.approx(0.6931, abs=1e-3)
    trace = offramp.record(deep, torch.randn(400, 3, 8))
    agrees = trace.label[:, :2] == trace.label[:, 2:]
    said = trace.stats["agrees"][:, :2]
    for k in range(2):  # it ranks rows: how often a row that agrees is said to be likelier than one that does not
        yes, no = said[agrees[:, k], k], said[~agrees[:, k], k]
        assert float((yes[:, None] > no[None]).float().mean()) > 0.6
    assert exits.gate == "linear"


def test_other_losses_leave_it_alone(deep):
    exits = offramp.attach(deep, [2], head="linear", gate="linear")
    assert not {id(p) for p in exits.gate_module.parameters()} & {id(p) for p in trainable(exits)}
    offramp.fit(deep, torch.randn(20, 3, 8), steps=2, progress=False)
    assert not exits.gate_module.weight.any()


def test_it_is_not_trained_together_with_the_backbone(deep):
    offramp.attach(deep, [2], gate="linear")
    with pytest.raises(BadArgument, match="leave backbone=True out"):
        offramp.fit(deep, torch.randn(20, 3, 8), loss="gate", backbone=True, progress=False)


def test_heads_may_have_gates_of_their_own_beside_it(deep):
    exits = offramp.attach(deep, [2, 4], head="speculative", gate="linear")
    data = torch.randn(60, 3, 8)
    shared, own = list(exits.gate_module.parameters()), trainable(exits, gate=True)
    assert not {id(p) for p in shared} & {id(p) for p in [*own, *trainable(exits, gate=False)]}
    assert {id(p) for p in trainable(exits, True, shared=True)} == {id(p) for p in shared}
    for loss in ("gate", "speculative_gate"):
        offramp.fit(deep, data, loss=loss, steps=3, lr=3e-2, progress=False)
    trace = offramp.record(deep, data)
    assert {"gate", "agrees"} <= set(trace.stats) and not torch.equal(trace.stats["gate"], trace.stats["agrees"])
    for policy, options in (("gate", {"threshold": 0.5}), ("speculative_gate", {"threshold": 0.4})):
        outcome = offramp.simulate(trace, policy, **options)
        with offramp.enable(deep, policy, **options) as run, torch.no_grad():
            deep(data)
        assert torch.equal(outcome.depths, run.stats.last_depths), policy


def test_a_trace_without_either_gate_names_both_ways(model, x):
    offramp.attach(model, [2, 4])
    trace = offramp.record(model, x)
    with pytest.raises(BadArgument, match=r"does not hold gate .*head='speculative'.*loss='speculative_gate'"):
        offramp.simulate(trace, "speculative_gate")


def test_heads_that_read_earlier_states_have_none(model, marks):
    before = marks(model)
    with pytest.raises(BadArgument, match="head 'adapter' answers from earlier ones too; leave gate out"):
        offramp.attach(model, [2], head="adapter", gate="linear")
    assert marks(model) == before


def test_it_can_be_calibrated(deep):
    turn(offramp.attach(deep, [2, 4], gate="linear"))
    trace = offramp.record(deep, torch.randn(300, 3, 8))
    trace.stats["agrees"][:, :2] = (trace.label[:, :2] == trace.label[:, 2:]).float() * 0.5 + 0.25
    cal = offramp.calibrate(trace, "gate")
    assert 0.25 < cal.policy.threshold <= 0.75 and offramp.simulate(trace, cal).saved > 0
    assert min(cal.certificate.order) > 0


@pytest.fixture
def folder(model, tmp_path):
    with turn(offramp.attach(model, [2, 4], gate="linear")) as exits:
        exits.save(tmp_path / "exits")
    return tmp_path / "exits"


def test_round_trip(model, folder):
    tensors = load_file(folder / "exits.safetensors")
    exits = offramp.load(model, folder)
    assert exits.gate == "linear" and find(model) is exits
    assert torch.equal(exits.gate_module.weight, tensors["gate.weight"]) and exits.gate_module.weight.any()


def test_a_directory_without_a_gate_says_nothing_of_one(model, tmp_path):
    with offramp.attach(model, [2]) as exits:
        exits.save(tmp_path)
    assert "gate" not in json.loads((tmp_path / "exits.json").read_text())
    assert offramp.load(model, tmp_path).gate is None


def rewrite(folder, **changes):
    body = json.loads((folder / "exits.json").read_text())
    body["sha256"]["exits.safetensors"] = checkpoint.sha256((folder / "exits.safetensors").read_bytes())
    (folder / "exits.json").write_text(json.dumps({**body, **changes}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: rewrite(f, gate=3), DamagedFile, "gate is 3, not a name"),
        (lambda f: rewrite(f, gate="lienar"), UnknownName, "did you mean 'linear'"),
        (lambda f: rewrite(f, gate=None), DamagedFile, "do not match the heads .gate.bias, gate.weight"),
        (lambda f: reshape(f), DamagedFile, r"gate.weight has shape \(1, 3\), the head has \(1, 16\)"),
    ],
)
def test_damage_is_refused_and_leaves_the_model_alone(model, marks, folder, change, error, message):
    before = marks(model)
    change(folder)
    with pytest.raises(error, match=message):
        offramp.load(model, folder)
    assert marks(model) == before


def reshape(folder):
    tensors = load_file(folder / "exits.safetensors")
    save_file({**tensors, "gate.weight": torch.zeros(1, 3)}, folder / "exits.safetensors")
    rewrite(folder)
