"""Training heads: they get better, and nothing else changes."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import offramp
from offramp import _registry
from offramp.errors import BadArgument, NotAttached, UnknownName
from offramp.fit import CACHE_BYTES, trainable
from offramp.heads.tied import Tied
from offramp.losses.distill import Distill
from offramp.testing.toy import ToyModel


@dataclass(frozen=True)
class Interrupted(Distill):
    """A loss that is stopped by Ctrl-C in its third step."""

    def each(self, predictions, final, targets):
        global steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return super().each(predictions, final, targets)


@pytest.fixture
def deep():
    """A model whose blocks change the answer, so that untrained heads are wrong."""
    model = ToyModel().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.mul_(12)
    return model


@pytest.fixture
def data():
    return torch.randn(400, 3, 8)


def test_heads_learn_to_agree_and_the_backbone_stays(deep, data):
    exits = offramp.attach(deep, [2, 4], head="linear")
    before = {k: v.clone() for k, v in deep.state_dict().items()}
    full = deep(data)
    report = offramp.fit(deep, data, steps=150, lr=1e-2, batch_size=100, rows=128, progress=False)
    after = deep.state_dict()
    assert list(after) == list(before) and torch.equal(deep(data), full)
    assert all(torch.equal(after[k], v) for k, v in before.items() if not k.startswith("exits."))
    assert not any(torch.equal(after[k], v) for k, v in before.items() if k.startswith("exits."))
    for depth in exits:
        assert report.agreement[depth] > report.before[depth] + 0.05
    assert len(report.losses) == 150 and report.seconds > 0
    assert sum(report.losses[-10:]) < 0.7 * sum(report.losses[:10])


def test_bars_while_states_are_gathered_and_while_heads_learn(deep, data, capsys):
    offramp.attach(deep, [2, 4], head="linear")
    offramp.fit(deep, data, steps=2, batch_size=100, progress=False)
    assert capsys.readouterr().out == ""
    offramp.fit(deep, data, steps=2, batch_size=100)
    gathered, learned = capsys.readouterr().out.splitlines()
    assert "gather states" in gathered and "fit exits" in learned and "100%" in gathered


def test_the_report_says_what_a_trace_of_the_held_out_rows_says(deep, data):
    offramp.attach(deep, [2, 4], head="translator", rank=4)
    report = offramp.fit(deep, data, steps=5, progress=False)
    trace = offramp.record(deep, data[360:])
    for k, depth in enumerate((2, 4)):
        wanted = (trace.label[:, k] == trace.label[:, -1]).float().mean().item()
        assert report.agreement[depth] == pytest.approx(wanted)


def test_labels_are_learnt(deep, data):
    labels = deep(data).argmax(-1).roll(1, 0).fill_(3)
    offramp.attach(deep, [2], head="linear")
    report = offramp.fit(deep, {"x": data, "labels": labels}, loss="labels", steps=60, lr=1e-2, progress=False)
    assert report.losses[-1] < 0.2 * report.losses[0]


def test_the_same_seed_gives_the_same_heads(data):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = ToyModel().eval()
        offramp.attach(model, [2], head="linear")
        offramp.fit(model, data, steps=5, rows=16, seed=seed, progress=False)
        found.append(model.exits["2"].proj.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("head", ["tied", "linear", "translator"])
def test_only_what_belongs_to_the_heads_is_trained(deep, head):
    exits = offramp.attach(deep, [2, 4], head=head)
    backbone = {id(p) for n, p in deep.named_parameters() if not n.startswith("exits.")}
    wanted = trainable(exits)
    assert wanted and not {id(p) for p in wanted} & backbone
    assert {id(p) for p in wanted} == {id(p) for p in deep.exits.parameters()}


class Registering(Tied):
    """A head that holds the backbone's projection as a module of its own, as PEFT's wrappers do."""

    @classmethod
    def build(cls, tap, base):
        head = cls(base)
        head.proj = base.projection
        return head


def test_a_shared_projection_is_not_trained(deep, monkeypatch):
    monkeypatch.setitem(_registry._classes, (offramp.ExitHead, "registering"), Registering)
    exits = offramp.attach(deep, [2], head="registering")
    assert {id(p) for p in trainable(exits)} == {id(p) for p in exits[2].exit_norm.parameters()}


def state(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}, [m.training for m in model.modules()]


@pytest.mark.parametrize("interrupted", [False, True])
def test_modes_and_requires_grad_are_put_back(deep, data, interrupted):
    global steps
    steps = 0
    offramp.attach(deep, [2, 4])
    deep.train()
    deep.norm.eval()
    deep.embed.weight.requires_grad_(False)
    deep.exits["2"].requires_grad_(False)
    before = state(deep)
    with offramp.enable(deep, "fixed", depth=2) as run:
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                offramp.fit(deep, data, loss=Interrupted(), steps=5, progress=False)
        else:
            offramp.fit(deep, data, steps=2, progress=False)
        assert run.stats.rows == 0 and not run.paused
    assert state(deep) == before
    assert all(p.grad is None for n, p in deep.named_parameters() if not n.startswith("exits."))


def test_fit_works_inside_no_grad(deep, data):
    offramp.attach(deep, [2])
    with torch.no_grad():
        assert len(offramp.fit(deep, data, steps=2, progress=False).losses) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, BadArgument, "steps=0 trains nothing; give steps=500"),
        ({"loss": "destill"}, UnknownName, "did you mean 'distill'"),
        ({"temprature": 2.0}, UnknownName, "did you mean 'temperature'"),
        ({"loss": Distill(), "temperature": 2.0}, BadArgument, r"options \['temperature'\] go with a loss's name"),
        ({"weighting": "linaer"}, UnknownName, "did you mean 'linear'"),
        ({"loss": "labels"}, BadArgument, "labels"),
        ({"data": []}, BadArgument, "the data holds no rows"),
        ({"batch_size": 0}, BadArgument, "batch_size=0"),
    ],
)
def test_what_fails_changes_nothing(deep, data, marks, options, error, message):
    offramp.attach(deep, [2])
    before, modes = {k: v.clone() for k, v in deep.state_dict().items()}, state(deep)
    with pytest.raises(error, match=message):
        offramp.fit(deep, **{"data": data, "steps": 2, "progress": False, **options})
    assert state(deep) == modes and all(torch.equal(v, before[k]) for k, v in deep.state_dict().items())


def test_no_exits(deep, data):
    with pytest.raises(NotAttached, match="no exits attached"):
        offramp.fit(deep, data)


def test_a_head_without_weights(deep, data):
    deep.norm = nn.LayerNorm(16, elementwise_affine=False)
    offramp.attach(deep, [2])
    with pytest.raises(BadArgument, match="no weights of its own to train"):
        offramp.fit(deep, data, progress=False)


def test_data_beyond_the_memory_is_left_out_with_a_warning(deep, data, monkeypatch):
    import sys

    assert CACHE_BYTES == 4 << 30
    monkeypatch.setattr(sys.modules["offramp.fit"], "CACHE_BYTES", 100)
    offramp.attach(deep, [2])
    with pytest.warns(UserWarning, match="fit uses the first 1 batches"):
        offramp.fit(deep, data, steps=1, progress=False)


def test_a_progress_bar_unless_told_otherwise(deep, data, capsys):
    offramp.attach(deep, [2])
    offramp.fit(deep, data, steps=1, progress=False)
    assert capsys.readouterr().out == ""
    offramp.fit(deep, data, steps=1)
    assert "fit exits" in capsys.readouterr().out
