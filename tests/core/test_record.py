"""A trace is what the exits would have said: against hand computation, and against the live run."""

import pytest
import torch

import offramp
from offramp.backbone import Observed
from offramp.errors import BadArgument, NotAttached
from offramp.record import batches, batches_in, evaluating
from offramp.testing.toy import ToyBackbone, ToyModel

AT = (2, 4)


@pytest.fixture
def exits(model):
    found = offramp.attach(model, AT, head="linear")
    with torch.no_grad():
        for depth in found:
            found[depth].proj.weight.add_(torch.randn(5, 16) / 4)
    return found


def by_hand(exits, x):
    """Logits [N, 3, classes] and states [N, 3, width], one row at a time."""
    logits, states = [], []
    with torch.no_grad():
        for row in x.split(1):
            with exits.backbone.chain().capture([2, 4, 6]) as kept:
                out = exits.model(row)
            states.append(torch.stack([kept[d][0, 0] for d in (2, 4, 6)]))
            logits.append(torch.stack([exits[2](states[-1][0]), exits[4](states[-1][1]), out[0]]))
    return torch.stack(logits), torch.stack(states)


def test_record_is_the_hand_computation(model, exits, x):
    labels = torch.tensor([0, 1, 2, 3, 4, -100, 0])
    trace = offramp.record(model, {"x": x, "labels": labels}, batch_size=3, logits=True)
    logits, states = by_hand(exits, x)
    p = logits.softmax(-1)
    top = p.topk(2, -1).values
    cosine = torch.cosine_similarity(states[:, 1:], states[:, :-1], dim=-1)
    assert len(trace) == 7 and trace.depths == (2, 4, 6) and trace.classes == 5
    assert trace.costs.tolist() == [2, 4, 6]
    assert torch.equal(trace.label, logits.argmax(-1)) and torch.equal(trace.targets, labels)
    for name, wanted in {
        "top1": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
        "entropy": -(p * p.log()).sum(-1),
    }.items():
        assert torch.allclose(trace.stats[name], wanted, atol=1e-5), name
    assert trace.stats["cosine"][:, 0].isnan().all()
    assert torch.allclose(trace.stats["cosine"][:, 1:], cosine, atol=1e-5)
    assert torch.allclose(trace.logits, logits, atol=1e-5)
    loss = -p.log().gather(-1, labels.clamp(min=0)[:, None, None].expand(-1, 3, 1)).squeeze(-1)
    assert torch.allclose(trace.losses, loss.masked_fill((labels == -100)[:, None], 0.0), atol=1e-4)


def test_without_labels_and_logits_there_are_none(model, exits, x):
    trace = offramp.record(model, x)
    assert trace.targets is None and trace.losses is None and trace.logits is None


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("confidence", {"threshold": [0.5, 0.45]}),
        ("margin", {"threshold": 0.2}),
        ("entropy", {"threshold": 1.2}),
        ("patience", {"patience": 1}),
        ("saturation", {"threshold": 0.95}),
        ("fixed", {"depth": 3}),
        ("never", {}),
    ],
)
def test_a_simulation_decides_as_the_live_run(model, exits, policy, options):
    x = torch.randn(60, 3, 8)
    outcome = offramp.simulate(offramp.record(model, x), offramp.policy(policy, **options))
    with offramp.enable(model, policy, **options) as run, torch.no_grad():
        live = model(x).argmax(-1)
    full = model(x).argmax(-1)
    assert torch.equal(outcome.depths, run.stats.last_depths)
    assert outcome.depth_mean == pytest.approx(run.stats.depth_mean) and outcome.saved == pytest.approx(run.stats.saved)
    assert outcome.agreement == pytest.approx((live == full).float().mean().item())
    assert policy in ("never", "fixed") or len(outcome.depths.unique()) > 1


def test_record_works_on_every_kind_of_data_alike(model, exits, x):
    whole = offramp.record(model, x, batch_size=7)
    for data in (x, {"x": x}, [x[:4], x[4:]], ({"x": part} for part in x.split(3))):
        trace = offramp.record(model, data, batch_size=2)
        assert torch.equal(trace.label, whole.label)
        assert torch.allclose(trace.stats["top1"], whole.stats["top1"], atol=1e-6)


def test_batches_cut_mappings_and_keep_what_is_no_tensor():
    found = list(batches({"x": torch.arange(5), "name": "n"}, 2))
    assert [b["x"].tolist() for b in found] == [[0, 1], [2, 3], [4]] and {b["name"] for b in found} == {"n"}


def test_batches_are_counted_where_the_data_says_how_many():
    x = torch.arange(5)
    for data in (x, {"name": "n", "x": x}, [x[:2], x[2:4], x[4:]]):
        assert batches_in(data, 2) == len(list(batches(data, 2))) == 3
    assert batches_in((x for _ in range(3)), 2) is None


class Tokens(ToyBackbone):
    """Every token is a row, as in a language model."""

    def observe(self, batch, depths):
        with torch.no_grad(), self.chain().capture([*depths, self.depth]) as kept:
            self.call(batch)
        n, tokens = batch.shape[:2]
        flat = [kept[d].reshape(n * tokens, -1) for d in (*depths, self.depth)]
        sample = torch.arange(n).repeat_interleave(tokens)
        return Observed(flat[:-1], flat[-1], None, torch.arange(tokens).repeat(n), sample)


def test_per_row_keeps_that_many_random_places_of_each_sample(model, exits):
    exits.backbone.__class__ = Tokens
    x = torch.randn(6, 9, 8)
    whole = offramp.record(model, x, batch_size=6)
    assert len(whole) == 54 and whole.position.tolist() == list(range(9)) * 6
    one = offramp.record(model, x, batch_size=4, per_row=1, seed=3)
    assert len(one) == 6 and len(set(one.position.tolist())) > 1
    assert torch.allclose(one.stats["top1"], whole.stats["top1"][torch.arange(6) * 9 + one.position], atol=1e-6)
    assert torch.equal(one.position, offramp.record(model, x, batch_size=4, per_row=1, seed=3).position)
    assert one.position.tolist() != offramp.record(model, x, batch_size=4, per_row=1, seed=4).position.tolist()
    two = offramp.record(model, x, per_row=2).position.reshape(6, 2)
    assert (two[:, 0] < two[:, 1]).all()


def test_record_pauses_what_is_enabled(model, exits, x):
    wanted = offramp.record(model, x)
    with offramp.enable(model, "fixed", depth=2) as run:
        trace = offramp.record(model, x)
        assert run.stats.rows == 0
        model(x)
        assert run.stats.exits == {2: 7}
    assert torch.equal(trace.label, wanted.label) and torch.equal(trace.stats["top1"], wanted.stats["top1"])


class Failing:
    def __iter__(self):
        yield torch.randn(2, 3, 8)
        raise KeyboardInterrupt


def test_modes_gradients_and_pause_are_put_back(model, exits, x):
    model.train()
    model.norm.eval()
    modes = [m.training for m in model.modules()]
    with offramp.enable(model, "fixed", depth=2) as run:
        offramp.record(model, x)
        assert [m.training for m in model.modules()] == modes
        with pytest.raises(KeyboardInterrupt):
            offramp.record(model, Failing())
        assert [m.training for m in model.modules()] == modes and not run.paused and torch.is_grad_enabled()


def test_evaluating_is_eval_inside(model):
    model.train()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.modules())


def test_a_progress_bar_when_asked(model, exits, x, capsys):
    offramp.record(model, x, batch_size=2)
    assert capsys.readouterr().out == ""
    offramp.record(model, x, batch_size=2, progress=True)
    said = capsys.readouterr().out
    assert "record" in said and "100%" in said


def test_the_hash_knows_model_and_heads(model, exits, x):
    first = offramp.record(model, x).model_hash
    assert first == offramp.record(model, x[:2]).model_hash
    with torch.no_grad():
        exits[2].proj.weight[0, 0] += 1
    second = offramp.record(model, x).model_hash
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    assert len({first, second, offramp.record(model, x).model_hash}) == 3


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.zeros(0, 3, 8), {}, "the data holds no rows"),
        ([], {}, "the data holds no rows"),
        (7, {}, "data must be a tensor, a mapping of tensors or an iterable of batches, not int"),
        ("text", {}, "not str"),
        (torch.zeros(2, 3, 8), {"batch_size": 0}, "batch_size=0 must be a positive number"),
    ],
)
def test_data_that_is_none(model, exits, data, options, message):
    with pytest.raises(BadArgument, match=message):
        offramp.record(model, data, **options)


def test_no_exits(x):
    with pytest.raises(NotAttached, match="no exits attached"):
        offramp.record(ToyModel(), x)
