"""Cascades: who is called for which rows, that live runs decide as simulations do, and what windows are for."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import offramp
from offramp.errors import BadArgument, UnknownName


class Counted(nn.Module):
    """A perceptron that notes the rows of every call."""

    def __init__(self, inputs, width, classes, wrap=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))
        self.wrap, self.calls = wrap, []

    def forward(self, x, mask=None):
        self.calls.append(len(x))
        logits = self.net(x if mask is None else x * mask[:, None])
        return SimpleNamespace(logits=logits) if self.wrap else logits


def train(model, x, y, steps=80):
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model.net(x), y).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    """Training and other rows of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    x, y = (torch.tensor(v) for v in load_digits(return_X_y=True))
    order = torch.randperm(len(x))
    x, y = (x[order] / 16).float(), y[order].long()
    return x[:600], y[:600], x[600:], y[600:]


@pytest.fixture(scope="module")
def trained(digits):
    """A model of 5 hidden units and one of 64."""
    torch.manual_seed(0)
    return [train(Counted(64, width, 10), *digits[:2]) for width in (5, 64)]


@pytest.fixture
def pair(trained):
    for model in trained:
        model.calls.clear()
    return trained


WINDOW = {"inner": "confidence", "low": 0.5, "high": 0.9}


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("window", WINDOW),
        ("confidence", {"threshold": 0.8}),
        ("entropy", {"threshold": 0.5}),
        ("fixed", {"depth": 1}),
        ("never", {}),
        ("tempered", {"inner": {"policy": "margin", "threshold": 0.5}, "temperature": 2.0}),
    ],
)
def test_the_second_model_sees_the_rows_that_go_on_and_no_others(pair, digits, policy, options):
    small, large = pair
    x = digits[2][:200]
    with torch.no_grad():
        first, second = small(x), large(x)
    small.calls.clear(), large.calls.clear()
    both = offramp.cascade(pair, policy, **options)
    with torch.no_grad():
        answer = both(x)
    out = offramp.simulate(offramp.record(both, x, batch_size=200, logits=True), both.policy)
    on = out.columns == 1
    assert both.stats.last_depths.tolist() == out.depths.tolist()
    assert torch.equal(answer[~on], first[~on]) and torch.allclose(answer[on], second[on], atol=1e-5)
    assert small.calls[0] == 200 and large.calls[:1] == ([int(on.sum())] if on.any() else [200])
    assert both.stats.blocks_run == 200 + int(on.sum()) and both.stats.blocks_full == 400
    if policy == "window":
        top1 = first.softmax(-1).max(-1).values
        assert torch.equal(on, (top1 >= 0.5) & (top1 <= 0.9)) and 0 < on.sum() < 200


def test_nobody_left_means_no_call(pair, digits):
    both = offramp.cascade(pair, "fixed", depth=1)
    both(digits[2][:7])
    assert pair[1].calls == [] and both.stats.saved == 0.5


def test_three_models_and_named_arguments_of_each_row():
    torch.manual_seed(0)
    models = [Counted(8, 4, 3) for _ in range(3)]
    x, mask = torch.randn(50, 8), torch.rand(50)
    with torch.no_grad():
        each = [model(x, mask) for model in models]
    tops = [z.softmax(-1).max(-1).values for z in each]
    policy = offramp.policy("confidence", threshold=[float(t.median()) for t in tops[:2]])
    for model in models:
        model.calls.clear()
    three = offramp.cascade(models, policy)
    answer = three(x, mask=mask)
    gone = tops[0] >= policy.threshold[0]
    after = ~gone & (tops[1] >= policy.threshold[1])
    wanted = torch.where(gone[:, None], each[0], torch.where(after[:, None], each[1], each[2]))
    assert torch.allclose(answer, wanted, atol=1e-6)
    assert [m.calls for m in models] == [[50], [int((~gone).sum())], [int((~gone & ~after).sum())]]
    assert three.stats.exits == {1: int(gone.sum()), 2: int(after.sum()), 3: int((~gone & ~after).sum())}


def test_a_batch_answers_as_its_rows_alone_do(pair, digits):
    both, x = offramp.cascade(pair, "window", **WINDOW), digits[2][:40]
    with torch.no_grad():
        alone = torch.cat([both(x[i : i + 1]) for i in range(40)])
        assert torch.allclose(both(x), alone, atol=1e-5)
        assert both(x[:0]).shape == (0, 10)


def test_the_return_type_is_that_of_the_models(digits):
    models = [Counted(64, 4, 10, wrap=True) for _ in range(2)]
    found = offramp.cascade(models, "never")(digits[2][:5])
    assert isinstance(found, SimpleNamespace) and torch.equal(found.logits, models[1](digits[2][:5]).logits)


def test_averages_are_of_probabilities(pair, digits):
    x = digits[2][:100]
    both = offramp.cascade(pair, "window", combine="average", **WINDOW)
    answer, trace = both(x), offramp.record(both, x, logits=True)
    mean = (pair[0](x).double().softmax(-1) + pair[1](x).double().softmax(-1)) / 2
    on = both.stats.last_depths == 2
    assert torch.allclose(answer[on].double().exp(), mean[on], atol=1e-6)
    assert torch.allclose(trace.logits[:, 1].double().exp(), mean, atol=1e-6)
    assert torch.equal(offramp.simulate(trace, both.policy).labels, answer.argmax(-1))


@pytest.mark.parametrize("data", ["tensor", "pairs", "mapping"])
def test_record_takes_every_kind_of_data(pair, digits, data):
    x, y = digits[2][:30], digits[3][:30]
    given = {"tensor": x, "pairs": [(x[:20], y[:20]), (x[20:], y[20:])], "mapping": {"x": x, "labels": y}}[data]
    trace = offramp.record(offramp.cascade(pair), given, logits=True)
    assert trace.depths == (1, 2) and trace.costs.tolist() == [1, 2] and trace.unit == "blocks"
    with torch.no_grad():
        assert torch.allclose(trace.logits[:, 0], pair[0](x), atol=1e-5)
    if data == "tensor":
        assert trace.targets is None
    else:
        loss = nn.functional.cross_entropy(pair[1](x), y, reduction="none")
        assert torch.equal(trace.targets, y) and torch.allclose(trace.losses[:, 1], loss, atol=1e-5)


def test_costs_are_those_of_the_models(pair, digits):
    trace = offramp.record(offramp.cascade(pair), digits[2][:30], costs="flops")
    sizes = [2 * (64 * w + 10 * w) for w in (5, 64)]
    assert trace.costs.tolist() == [sizes[0], sum(sizes)] and trace.unit == "flops"
    seconds = offramp.record(offramp.cascade(pair), digits[2][:30], costs="seconds").costs
    assert 0 < seconds[0] < seconds[1] < 0.1


def test_calibrated_end_to_end_with_a_certificate(pair, digits, tmp_path):
    x, y = digits[2:]
    both = offramp.cascade(pair)
    trace = offramp.record(both, {"x": x[:600], "y": y[:600]})
    cal = offramp.calibrate(trace, "confidence", alpha=0.05, delta=0.05)
    cal.save(tmp_path / "c")
    both.use(offramp.Calibration.load(tmp_path / "c"))
    full = pair[1](x[600:]).argmax(-1)
    agree = (both(x[600:]).argmax(-1) == full).float().mean()
    assert both.certificate == cal.certificate is not None and agree >= 0.95 and both.stats.saved > 0.2


def test_a_budget_in_measured_operations_is_met(pair, digits):
    both = offramp.cascade(pair)
    trace = offramp.record(both, digits[2], costs="flops")
    budget = float(trace.costs.mean())
    both.use(offramp.calibrate(trace[::2], "confidence", method="budget", budget=budget))
    both(digits[2][1::2])
    spent = torch.where(both.stats.last_depths == 2, trace.costs[1], trace.costs[0]).mean()
    assert float(spent) == pytest.approx(budget, rel=0.08)  # 598 rows, of which about half go on: 4 % at one sigma


@pytest.mark.parametrize("task", ["selective", "ood", "both"])
def test_windows_for_three_tasks(pair, digits, task):
    """Half of the rows are noise from elsewhere. A window of a tenth on either side sends a fifth of the rows on, and
    solves the task better than the fifth of the rows with the least confidence sent on, which costs as much. The points
    lie amid the scores: near their low end (tpr 0.8 here) window and least confident are nearly the same rows."""
    x, y = digits[2:]
    if task != "selective":
        x = torch.cat([x, torch.rand(len(x), 64)])
        y = torch.cat([y, torch.full_like(y, -100)])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], y[order]
    half = len(x) // 2
    both = offramp.cascade(pair, combine="average")
    point = {"selective": {"coverage": 0.8}, "ood": {"tpr": 0.5}, "both": {"coverage": 0.4}}[task]
    trace = offramp.record(both, {"x": x[:half], "y": y[:half]})
    both.use(offramp.calibrate(trace, "confidence", method="window_fit", task=task, mixed=task != "selective", **point))

    def bad(logits):
        """Share of what the task counts as wrong among the rows that it accepts."""
        score, right = logits.softmax(-1).max(-1).values, logits.argmax(-1) == y[half:]
        here = y[half:] != -100
        if task == "ood":  # noise accepted at a threshold that keeps half of the digits
            return float((score[~here] >= score[here].quantile(0.5)).double().mean())
        kept = score.argsort(descending=True)[: int(point["coverage"] * len(score))]
        return float((~right[kept]).double().mean())

    with torch.no_grad():
        found, on = bad(both(x[half:])), float((both.stats.last_depths == 2).double().mean())
        least = float(trace.stats["top1"][:, 0].quantile(0.2))
        below = bad(both.use("confidence", threshold=least)(x[half:]))
        same = float((both.stats.last_depths == 2).double().mean())
        alone, whole = bad(pair[0](x[half:])), bad(both.use("never")(x[half:]))
    assert on == pytest.approx(0.2, abs=0.06) and same == pytest.approx(0.2, abs=0.06)
    assert whole < found < alone and found < below


def test_a_calibration_of_other_models_is_refused_unless_forced(pair, digits):
    both = offramp.cascade(pair)
    cal = offramp.calibrate(offramp.record(both, digits[2]), "confidence", alpha=0.1)
    other = [pair[0], Counted(64, 8, 10)]
    with pytest.raises(BadArgument, match="made with other weights.*force=True"):
        offramp.cascade(other, cal)
    assert offramp.cascade(other, cal, force=True).certificate is None
    with pytest.raises(BadArgument, match="made with other weights"):  # the same models, combined otherwise
        offramp.cascade(pair, cal, combine="average")
    assert offramp.cascade(pair, cal).certificate == cal.certificate is not None


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda a, b: offramp.cascade([a]), BadArgument, "two models or more"),
        (lambda a, b: offramp.cascade([a, 3]), BadArgument, "not int"),
        (lambda a, b: offramp.cascade([a, b], "confidense"), UnknownName, "did you mean 'confidence'"),
        (lambda a, b: offramp.cascade([a, b], combine="mean"), BadArgument, "choose one of last, average"),
        (lambda a, b: offramp.cascade([a, b], "saturation", threshold=0.9), BadArgument, "looks at cosine"),
        (lambda a, b: offramp.cascade([a, b], "confidence", threshold=[0.5, 0.5]), BadArgument, "2 thresholds for 1"),
        (lambda a, b: offramp.cascade([a, Counted(64, 4, 3)])(torch.randn(2, 64)), BadArgument, "share rows and class"),
        (lambda a, b: offramp.cascade([nn.Identity(), b])(torch.randn(2, 3, 64)), BadArgument, r"not \[2, 3, 64\]"),
        (lambda a, b: offramp.record(offramp.cascade([a, b]), []), BadArgument, "no rows"),
        (lambda a, b: offramp.record(offramp.cascade([a, b]), torch.randn(2, 64), costs="ms"), UnknownName, "'ms'"),
    ],
)
def test_what_does_not_fit_is_refused(pair, make, kind, message):
    with pytest.raises(kind, match=message):
        make(*pair)
