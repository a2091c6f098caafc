"""What works on any model works on those of timm: cascades, budgets, learned gates."""

import pytest
import timm
import torch

import offramp
from offramp.testing.policies import check_replay

AT = (2, 4)


@pytest.fixture
def data():
    return {"x": torch.randn(60, 3, 32, 32), "labels": torch.arange(60) % 10}


@pytest.fixture
def small():
    block = timm.models.resnet.BasicBlock
    return timm.models.resnet.ResNet(block, (1, 1, 1, 1), channels=(16, 16, 16, 32), num_classes=10).eval()


@torch.no_grad()
def test_a_window_cascade_asks_the_second_model_about_unsure_images_only(small, model, data):
    both, seen = offramp.cascade([small, model], "never"), []
    trace = offramp.record(both, data, batch_size=60)
    cal = offramp.calibrate(trace, "confidence", method="window_fit", coverage=0.5, width=0.2, task="ood")
    model.patch_embed.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    answers = both.use(cal)(data["x"])
    on = both.stats.last_depths == 2
    assert seen == [on.sum()] and 0 < seen[0] < 40
    seen.clear()
    wanted = torch.where(on[:, None], model(data["x"]), small(data["x"]))
    assert torch.allclose(answers, wanted, atol=1e-4)
    score = small(data["x"]).softmax(-1).amax(-1)
    assert score[on].max() - score[on].min() < score.max() - score.min()  # those in the middle, not at either end


@pytest.mark.parametrize("method", ["budget", "exponential_weights"])
@torch.no_grad()
def test_a_budget_in_measured_operations_is_met(method, small, data):
    """The mean cost of real images, on real blocks, is what was asked, in units in which blocks differ."""
    offramp.attach(small, [1, 2, 3], "pooled_linear")
    trace = offramp.record(small, data, batch_size=60, costs="flops")
    asked = float(0.3 * trace.costs[0] + 0.7 * trace.costs[-1])
    cal = offramp.calibrate(trace, "confidence", method=method, budget=asked)
    assert cal.certificate is None
    with offramp.enable(small, cal) as run:
        small(data["x"])
    spent = sum(float(trace.costs[d - 1]) * n for d, n in run.stats.exits.items()) / run.stats.rows
    step = float(trace.costs[-1] - trace.costs[0]) / len(trace)
    assert spent <= asked + step and spent > asked - 0.2 * (trace.costs[-1] - trace.costs[0])
    assert offramp.simulate(trace, cal).depths.tolist() == run.stats.last_depths.tolist()


def test_gates_of_joint_exits_are_learned_on_a_transformer(model, data):
    offramp.attach(model, AT, "linear", gate="jei")
    before = model.exits["gate"].weight.detach().clone()
    report = offramp.fit(model, data, loss="joint_exit", cost=0.7, steps=40, lr=1e-2, rows=54, progress=False)
    assert report.losses[-1] < report.losses[0] and not torch.equal(model.exits["gate"].weight, before)
    with offramp.enable(model, "jei") as run, torch.no_grad():
        model(data["x"])
    assert run.stats.rows == 60 and run.stats.saved > 0
    check_replay(offramp.policy("jei"), model, data["x"], batch_size=20)
