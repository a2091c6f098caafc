"""The alternating training of heads and gates, by hand, by its gradients, and end to end."""

import pytest
import torch

import offramp
from offramp._registry import create
from offramp.errors import BadArgument, NotAttached
from offramp.kernels.halting import joint
from offramp.loss import Moment
from offramp.losses.joint_exit import gate_loss, weighed
from offramp.testing.toy import ToyModel


def made(**options):
    return create(offramp.Loss, "joint_exit", **options)


def test_the_ratio_is_a_constant():
    """Detached, the gradient is ratio_i P_il / (N G); were it not, it would be 1 / (N G) whatever P says."""
    losses = (torch.rand(4, 3) + 0.1).requires_grad_()
    chance = torch.rand(4, 3)
    value = weighed(losses, chance)
    assert value.item() == pytest.approx(losses.mean().item())  # the size of the loss is kept
    (gradient,) = torch.autograd.grad(value, losses)
    ratio = losses.sum(1) / (losses * chance).sum(1)
    assert torch.allclose(gradient, ratio[:, None] * chance / 12) and not torch.allclose(gradient, torch.tensor(1 / 12))


def test_a_row_that_never_leaves_at_a_head_adds_nothing():
    losses = torch.ones(2, 2, requires_grad=True)
    value = weighed(losses, torch.tensor([[0.0, 0.0], [0.5, 0.5]]))
    value.backward()
    assert value.item() == pytest.approx(0.5) and losses.grad.tolist() == [[0.0, 0.0], [0.25, 0.25]]


def test_gates_open_from_the_best_place_on():
    """Cross-entropies 2, 0.5, 0.4, 0.1 at costs 0.7 * (1, 2, 3, 4) / 4: sums 2.175, 0.85, 0.925, 0.8 and so on."""
    chance = torch.tensor([[-2.0, -0.5, -0.4, -0.1], [-0.1, -0.1, -0.1, -0.1], [-9.0, -9.0, -0.1, -3.0]])
    said = [torch.stack([c, (1 - c.exp()).log()], 1) for c in chance.unbind(1)]
    targets = torch.zeros(3, dtype=torch.long)
    assert made(cost=0.7).stays(said, targets, (1, 2, 3, 4)).tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 1]]
    assert made(cost=1.4).stays(said, targets, (1, 2, 3, 4)).tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    right = made(cost=0.5, criterion="right").stays(said, targets, (1, 2, 3, 4))
    assert right.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]  # the first place whose chance is above one half


def test_rare_positives_weigh_at_most_five_times():
    wanted = torch.zeros(20, 2)
    wanted[0, 0], wanted[:5, 1] = 1, 1
    odds = torch.zeros(20, 2, requires_grad=True)
    gate_loss(odds, wanted).backward()
    # d BCE / d odds at 0 is -0.5 * weight for positives and 0.5 for negatives, over 40 entries
    assert odds.grad[0].tolist() == pytest.approx([-0.5 * 5 / 40, -0.5 * 3 / 40])
    assert odds.grad[19].tolist() == pytest.approx([0.5 / 40, 0.5 / 40])


def test_phases_take_turns():
    loss = made(warmup=0.1, period=200)
    assert [loss.phase(s, 2000) for s in (0, 199, 200, 399, 400, 599, 600)] == [
        "warmup", "warmup", "heads", "heads", "gates", "gates", "heads"
    ]  # fmt: skip
    short = [made().phase(s, 50) for s in range(50)]
    assert short == ["warmup"] * 10 + (["heads"] * 10 + ["gates"] * 10) * 2


def test_each_phase_moves_its_own():
    exits = [torch.randn(6, 5, requires_grad=True) for _ in range(3)]
    odds, final, targets = torch.randn(6, 3, requires_grad=True), torch.randn(6, 5), torch.randint(5, (6,))
    loss = made()
    for step, moved in ((0, [True, False]), (12, [True, False]), (25, [False, True])):
        moment = Moment(depths=(1, 2, 3, 6), odds=odds, step=step, steps=50)
        found = torch.autograd.grad(loss(exits, final, targets, moment=moment), [exits[0], odds], allow_unused=True)
        assert [g is not None and bool(g.any()) for g in found] == moved, loss.phase(step, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": -1.0}, "cost must be a number from 0"),
        ({"warmup": 1.0}, "warmup must be a number from 0 to below 1"),
        ({"period": 0}, "period must be a whole number of steps"),
        ({"criterion": "luck"}, "criterion 'luck' is not one of loss, right, sure"),
    ],
)
def test_what_says_nothing(options, message):
    with pytest.raises(BadArgument, match=message):
        made(**options)


@pytest.fixture
def rows():
    def make(count, seed):
        make = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 3, 8, generator=make)
        return {"x": x, "labels": (x[:, 0, :5] + 0.5 * x[:, 1, :5]).argmax(-1)}

    return make


def test_the_cost_says_how_early_rows_leave(rows):
    torch.manual_seed(0)
    model = ToyModel().eval()
    exits = offramp.attach(model, [1, 2, 4], head="linear", gate="jei")
    data = rows(600, 0)
    offramp.fit(model, data, loss="labels", schedule="joint", steps=200, lr=1e-2, batch_size=64, progress=False)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("exits.")}
    found = []
    for cost in (0.05, 2.0):
        torch.nn.init.zeros_(exits.gate_module.weight)
        offramp.fit(model, data, loss="joint_exit", cost=cost, steps=300, lr=2e-2, progress=False)
        trace = offramp.record(model, rows(300, 1))
        outcome = offramp.simulate(trace, "jei")
        found.append((outcome.depth_mean, outcome.accuracy))
        mass = joint(trace.stats["jei"][:, :-1])[0]
        assert torch.allclose(mass.sum(1), torch.ones(300))
    assert found[0][0] > found[1][0] and found[0][1] > found[1][1] > 0.3
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())  # the model itself is frozen


def test_what_cannot_be_trained_so(rows):
    model = ToyModel().eval()
    with offramp.attach(model, [2, 4], head="linear"):
        with pytest.raises(NotAttached, match="have no gate; .*gate=\"jei\".*joint_exit"):
            offramp.fit(model, rows(20, 0), loss="joint_exit", progress=False)
    offramp.attach(model, [2, 4], head="linear", gate="jei")
    with pytest.raises(BadArgument, match="about a model as it is"):
        offramp.fit(model, rows(20, 0), loss="joint_exit", backbone=True, progress=False)
    with pytest.raises(BadArgument, match="needs labels"):
        offramp.fit(model, rows(20, 0)["x"], loss="joint_exit", progress=False)
