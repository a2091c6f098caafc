"""Training a model together with its exits: its weights move, the loss falls, and the model is put back."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.live import Live
from offramp.loss import Schedule
from offramp.testing.toy import ToyModel


@pytest.fixture
def data():
    make = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, generator=make)
    return {"x": x, "labels": (x[:, 0] @ torch.randn(8, 5, generator=make)).argmax(-1)}


def train(model, data, **options):
    given = {"loss": "layerskip", "backbone": True, "batch_size": 32, "lr": 1e-2, "progress": False, "steps": 60}
    return offramp.fit(model, data, **{**given, **options})


def test_weights_of_the_backbone_move_and_the_loss_falls(model, data):
    offramp.attach(model, [2, 4], head="shared")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = train(model, data)
    after = model.state_dict()
    assert list(after) == list(before) and not any(torch.equal(after[k], v) for k, v in before.items())
    assert sum(report.losses[-5:]) < 0.5 * sum(report.losses[:5])
    assert report.agreement[4] > report.before[4]
    with torch.no_grad():
        assert float((model(data["x"]).argmax(-1) == data["labels"]).float().mean()) > 0.8


def test_rates_of_layer_dropout_rise_with_depth(model):
    exits = offramp.attach(model, [2])
    x = torch.randn(4, 3, 8)
    for depth, rate in ((6, 0.3), (6, 0.0)):
        found = Live(exits, x, 4, 0, rate).rates
        assert found == pytest.approx([rate * (2 ** (i / (depth - 1)) - 1) for i in range(depth)])
        assert found[0] == 0 and found[-1] == pytest.approx(rate)


def test_a_dropped_block_hands_on_its_input_sample_by_sample(model):
    """The last block is dropped for about 60 % of the samples; their last state is the one before it."""
    exits = offramp.attach(model, [5])
    live = Live(exits, torch.randn(200, 3, 8), 200, 0, 0.6)
    live.rates = [0.0] * 5 + [0.6]
    seen = next(iter(live))
    same = (seen.hidden[0] == seen.final).all(-1)
    assert 0.45 < same.float().mean() < 0.75
    assert seen.final.requires_grad and not model.training


def test_each_round_has_every_row_once_in_another_order(model):
    exits = offramp.attach(model, [2])
    x = torch.randn(10, 3, 8)
    rounds = iter(Live(exits, {"x": x, "labels": torch.arange(10)}, 4, 0, 0.0))
    found = [torch.cat([next(rounds).targets for _ in range(3)]) for _ in range(2)]
    assert all(f.sort().values.tolist() == list(range(10)) for f in found) and not torch.equal(*found)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_requires_grad_are_put_back(model, data, fails):
    offramp.attach(model, [2], head="tied")
    model.train()
    model.norm.eval()
    model.embed.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    if fails:
        with pytest.raises(BadArgument, match="needs labels"):
            train(model, data["x"], layer_dropout=0.2)
    else:
        train(model, data, layer_dropout=0.2, steps=2)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_data_that_ends_says_so(model, data):
    offramp.attach(model, [2])
    batches = [{k: v[i : i + 32] for k, v in data.items()} for i in (0, 32)]
    assert len(train(model, batches, steps=5).losses) == 5
    with pytest.raises(BadArgument, match="the data ended after 1 batches; give an iterable that can be gone through"):
        train(model, iter(batches), steps=5)
    with pytest.raises(BadArgument, match="no rows"):
        train(model, [], steps=5)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_that_are_none(model, data, rate):
    offramp.attach(model, [2])
    with pytest.raises(BadArgument, match="is a rate from 0 to 1"):
        train(model, data, layer_dropout=rate)
    with pytest.raises(BadArgument, match="backbone=True"):
        train(model, data, backbone=False, loss="labels", layer_dropout=0.1)


def test_a_loss_gets_the_states_it_asks_for(model):
    exits = offramp.attach(model, [2, 4])
    x = torch.randn(4, 3, 8)
    seen = next(iter(Live(exits, x, 4, 0, 0.0, taps=[1, 4, 5])))
    states = seen.states
    assert sorted(states) == [1, 2, 4, 5, 6] and states[6] is seen.final
    assert seen.hidden[0] is states[2] and seen.hidden[1] is states[4] and len(seen.hidden) == 2


def test_heads_that_mix_read_their_own_states_beside_those_of_a_loss(model):
    exits = offramp.attach(model, [2, 4], head="adapter")
    x = torch.randn(4, 3, 8)
    plain, more = exits.observe(x), exits.observe(x, [1, 4, 5])
    assert sorted(more.states) == [1, 2, 4, 5, 6] and plain.states == {}
    for a, b in zip(exits.inputs(plain), exits.inputs(more), strict=True):
        assert torch.equal(a, b)


def test_a_schedule_reaches_the_loss_in_every_step(data):
    """From 0 on, the exits' share of LayerSkip's loss is nothing at first: only the last layer's loss is left."""
    found = []
    for weights in (None, Schedule("linear", 0.0, 1.0, 3), Schedule("cosine", 1.0, 1.0, 3)):
        torch.manual_seed(0)
        model = ToyModel()
        offramp.attach(model, [2, 4], head="shared")
        found.append(train(model, data, steps=6, weights=weights).losses)
    assert found[0] == found[2] and found[0][0] != found[1][0]
