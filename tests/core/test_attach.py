"""Heads on the model and off again, exactly."""

import copy
import gc
import weakref

import pytest
import torch

import offramp
from offramp import _registry
from offramp.attach import depths_from, find
from offramp.errors import BadArgument, NotAttached, UnknownName, UnsupportedModel
from offramp.heads.tied import Tied
from offramp.testing.toy import ToyModel


@pytest.mark.parametrize(
    ("at", "depths"),
    [(3, (3,)), ([4, 2], (2, 4)), (0.5, (3,)), ([0.25, 0.5, 5], (2, 3, 5)), (range(1, 4), (1, 2, 3)), ((2.0,), (2,))],
)
def test_taps_and_fractions(at, depths):
    assert depths_from(at, 6) == depths and all(type(d) is int for d in depths_from(at, 6))


@pytest.mark.parametrize("at", [0, -1, 6, 7, 0.01, 0.99, 2.5, float("nan"), float("inf"), [2, 6]])
def test_a_tap_outside_the_model(at):
    with pytest.raises(BadArgument, match=r"it has 6 blocks, so an exit can be at 1 to 5.*depth 6 is the full model"):
        depths_from(at, 6)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ([], "names no tap; this model has taps 1 to 5"),
        ("4", "tap '4' is neither"),
        (True, "tap True is neither"),
        (None, "tap None"),
        ([2, 2], r"names a depth twice \(\[2, 2\]\)"),
        ([3, 0.5], "names a depth twice"),
    ],
)
def test_taps_that_mean_nothing(at, message):
    with pytest.raises(BadArgument, match=message):
        depths_from(at, 6)


def test_attach_changes_no_weight_and_no_answer(model, x):
    full, keys = model(x), list(model.state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    exits = offramp.attach(model, [2, 4])
    assert exits.at == (2, 4) and list(exits) == [2, 4] and len(exits) == 2
    assert exits[4] is model.exits["4"] and find(model) is exits
    assert "at=[2, 4], head='tied'" in repr(exits)
    assert torch.equal(model(x), full)
    after = model.state_dict()
    assert [k for k in after if not k.startswith("exits.")] == keys
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_detach_is_exact(model, x, marks):
    before, keys, full = marks(model), list(model.state_dict()), model(x)
    exits = offramp.attach(model, [2, 4], head="linear")
    exits.detach()
    exits.detach()
    assert marks(model) == before and list(model.state_dict()) == keys and torch.equal(model(x), full)
    assert not hasattr(model, "exits")
    for use in (lambda: exits[2], lambda: exits.modules, lambda: exits.save("nowhere"), lambda: find(model)):
        with pytest.raises(NotAttached, match=r"offramp.attach\(model, at="):
            use()
    offramp.attach(model, 3).detach()


def test_the_second_exits_are_not_taken_off_by_the_first(model):
    old = offramp.attach(model, 2)
    old.detach()
    new = offramp.attach(model, 4)
    old.detach()
    assert find(model) is new
    with pytest.raises(NotAttached):
        old[2]


def test_with_detaches_also_on_an_exception(model, marks):
    before = marks(model)
    with pytest.raises(KeyboardInterrupt), offramp.attach(model, 2):
        raise KeyboardInterrupt
    assert marks(model) == before


def test_detach_while_enabled(model, x, marks):
    before, full = marks(model), model(x)
    exits = offramp.attach(model, 2)
    run = offramp.enable(model, "fixed", depth=2)
    exits.detach()
    assert marks(model) == before and torch.equal(model(x), full) and not run.enabled
    run.disable()


def test_attach_twice(model, marks):
    exits = offramp.attach(model, [2, 4])
    before = marks(model)
    with pytest.raises(NotAttached, match=r"already has exits at \[2, 4\]; first: exits.detach\(\)"):
        offramp.attach(model, 3)
    assert marks(model) == before and exits[2] is not None


def test_a_model_with_an_attribute_of_that_name(model, marks):
    model.exits = "my own"
    before = marks(model)
    with pytest.raises(NotAttached, match="attribute 'exits' of its own"):
        offramp.attach(model, 2)
    assert marks(model) == before


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"at": 9}, BadArgument),
        ({"head": "tide"}, UnknownName),
        ({"rank": 3}, UnknownName),
        ({"head": "translator", "rank": 0}, BadArgument),
    ],
)
def test_what_fails_changes_nothing(model, marks, change, error):
    before = marks(model)
    with pytest.raises(error):
        offramp.attach(model, **{"at": 2, **change})
    assert marks(model) == before


def test_a_model_nobody_claims_is_unchanged(marks):
    model = torch.nn.Linear(2, 2)
    before = marks(model)
    with pytest.raises(UnsupportedModel, match="no plugin claims torch.nn.modules.linear.Linear"):
        offramp.attach(model, 2)
    assert marks(model) == before


class Refusing(Tied):
    @classmethod
    def build(cls, tap, base):
        return cls(base)

    @classmethod
    def attached(cls, exits):
        raise KeyboardInterrupt


def test_a_head_that_fails_when_all_are_attached(model, marks, monkeypatch):
    monkeypatch.setitem(_registry._classes, (offramp.ExitHead, "refusing"), Refusing)
    before = marks(model)
    with pytest.raises(KeyboardInterrupt):
        offramp.attach(model, 2, head="refusing")
    assert marks(model) == before


def test_no_exit_at_that_depth(model):
    exits = offramp.attach(model, [2, 4])
    with pytest.raises(BadArgument, match=r"no exit at depth 3; exits are at \[2, 4\]"):
        exits[3]


@pytest.mark.parametrize("head", ["tied", "linear", "translator"])
def test_a_deep_copy_stands_alone(model, x, head):
    exits = offramp.attach(model, [2, 4], head=head)
    other = copy.deepcopy(model)
    theirs = find(other)
    assert theirs is not exits and theirs.model is other and theirs.backbone.model is other
    hidden = torch.randn(3, 16)
    assert torch.equal(theirs[2](hidden), exits[2](hidden))
    with torch.no_grad():
        model.head.weight.zero_()
        model.exits.requires_grad_(True)
        for p in model.exits.parameters():
            p.zero_()
    assert theirs[2](hidden).abs().sum() > 0 and exits[2](hidden).std(0).sum() == 0
    exits.detach()
    assert find(other) is theirs
    with offramp.enable(other, "fixed", depth=2) as run:
        other(x)
    assert run.stats.exits == {2: 7}
    theirs.detach()
    assert list(other.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("head", ["tied", "linear", "translator"])
def test_to_moves_the_heads_too(model, x, head):
    offramp.attach(model, [2, 4], head=head)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.exits.parameters()} == {torch.bfloat16}
    with offramp.enable(model, "fixed", depth=2) as run:
        assert model(x.bfloat16()).dtype == torch.bfloat16
    assert run.stats.exits == {2: 7}


def test_heads_take_the_models_dtype_device_and_mode(x):
    model = ToyModel().to(torch.float64).train()
    exits = offramp.attach(model, 2, head="translator")
    assert {p.dtype for p in model.exits.parameters()} == {torch.float64} and exits[2].training
    assert not offramp.attach(ToyModel().eval(), 2)[2].training


def test_a_dropped_model_is_freed():
    model = ToyModel()
    offramp.attach(model, 2)
    offramp.enable(model, "never")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
