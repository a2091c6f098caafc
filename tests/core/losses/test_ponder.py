"""The pondering loss, against figures worked out by hand and against its definition."""

import pytest
import torch
from torch.nn import functional

import offramp
from offramp._registry import create
from offramp.errors import BadArgument, NotAttached
from offramp.kernels.halting import halting
from offramp.loss import Moment
from offramp.testing.toy import ToyModel


def made(**options):
    return create(offramp.Loss, "ponder", **options)


def test_the_truncated_prior_by_hand():
    prior = made(stop=0.1).log_prior(12).exp()
    wanted = [0.1, 0.09, 0.081, 0.0729, 0.0656, 0.059, 0.0531, 0.0478, 0.043, 0.0387, 0.0349, 0.3138]
    assert prior.tolist() == pytest.approx(wanted, abs=5e-5) and prior.sum().item() == pytest.approx(1)
    assert (prior * torch.arange(1, 13)).sum().item() == pytest.approx(7.1757, abs=5e-5)


def test_the_normal_prior_is_centred_where_it_is_asked():
    prior = made(prior="normal", stop=0.25).log_prior(8).exp()
    assert prior.argmax() == 3 and prior[2].item() == pytest.approx(prior[4].item())
    assert (prior[4] / prior[3]).item() == pytest.approx(torch.tensor(-1.0).exp().item())


@pytest.mark.parametrize("divergence", ["from_prior", "to_prior"])
def test_it_is_its_definition(divergence):
    exits, final = torch.randn(3, 6, 5).unbind(0), torch.randn(6, 5)
    odds, targets = torch.randn(6, 3), torch.tensor([1, 2, 0, -100, 4, 3])
    loss = made(beta=0.3, stop=0.2, divergence=divergence)
    p = halting(odds.sigmoid()).double()
    each = torch.stack(
        [functional.cross_entropy(q, targets, reduction="none", ignore_index=-100) for q in (*exits, final)], 1
    )
    prior = loss.log_prior(4).exp()
    a, b = (prior, p) if divergence == "from_prior" else (p, prior)
    apart = (a * (a / b).log()).sum(1)
    wanted = ((p * each).sum(1) + 0.3 * apart)[targets >= 0].mean()
    assert loss(exits, final, targets, moment=Moment(odds=odds)).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_certain_gates_give_finite_gradients():
    odds = torch.tensor([[80.0, -80.0], [-90.0, 90.0]], requires_grad=True)
    exits = torch.randn(2, 2, 5).unbind(0)
    made()(exits, torch.randn(2, 5), torch.tensor([1, 2]), moment=Moment(odds=odds)).backward()
    assert odds.grad.isfinite().all()


def test_numbers_have_a_squared_error():
    exits, final, targets = torch.randn(2, 4, 1).unbind(0), torch.randn(4, 1), torch.randn(4)
    loss = made(beta=0.0)(exits, final, targets, moment=Moment(odds=torch.full((4, 2), 50.0)))
    assert loss.item() == pytest.approx((exits[0][:, 0] - targets).square().mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta must be a weight from 0 on"),
        ({"stop": 1.0}, "stop must be a chance between 0 and 1"),
        ({"prior": "flat"}, "prior 'flat' is not one of geometric, normal"),
        ({"divergence": "both"}, "divergence 'both' is not one of"),
    ],
)
def test_what_says_nothing(options, message):
    with pytest.raises(BadArgument, match=message):
        made(**options)


def rows(count, seed):
    """Rows whose label is read off early where the last input says so, and only deep otherwise."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, generator=make)
    return {"x": x, "labels": (x[:, 0, :5] + 0.3 * x[:, 1, :5]).argmax(-1)}


def test_rows_halt_where_the_prior_and_the_labels_say():
    torch.manual_seed(0)
    model = ToyModel().eval()
    offramp.attach(model, [1, 2, 4], head="linear", gate="lambda")
    data = rows(400, 0)
    offramp.fit(model, data, loss="labels", schedule="joint", steps=150, lr=1e-2, batch_size=64, progress=False)
    depths = []
    for stop in (0.7, 0.1):
        report = offramp.fit(model, data, loss="ponder", stop=stop, steps=200, lr=1e-2, progress=False)
        assert sum(report.losses[-20:]) < sum(report.losses[:20])
        trace = offramp.record(model, rows(200, 1))
        assert ((trace.stats["lambda"] > 0) & (trace.stats["lambda"] <= 1)).all()
        assert (trace.stats["lambda"][:, -1] == 1).all()
        depths.append(offramp.simulate(trace, "quantile_halting").depth_mean)
    assert depths[0] < depths[1]


def test_it_needs_its_gate():
    model = ToyModel().eval()
    offramp.attach(model, [2, 4], head="linear", gate="linear")
    with pytest.raises(NotAttached, match="these exits have gate 'linear'; attach one: .*gate=\"lambda\".*ponder"):
        offramp.fit(model, rows(20, 0), loss="ponder", progress=False)
    with pytest.raises(BadArgument, match="needs the log-odds"):
        made()([torch.randn(2, 5)], torch.randn(2, 5), torch.tensor([1, 2]))
