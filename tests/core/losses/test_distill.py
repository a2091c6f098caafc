import math

import pytest
import torch

import offramp
from offramp._registry import create
from offramp.loss import Loss


def value(prediction, final, **options):
    return float(create(Loss, "distill", **options)([torch.tensor(prediction)], torch.tensor(final)))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


P, Q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]


def logs(p):
    return [[math.log(v) for v in p]]


def test_it_is_the_divergence_from_teacher_to_head():
    assert value(logs(Q), logs(P)) == pytest.approx(kl(P, Q), rel=1e-5)
    skewed = [0.7, 0.2, 0.1]  # the two directions differ: 0.1838 and 0.2010
    assert value(logs(skewed), logs(Q)) == pytest.approx(kl(Q, skewed), rel=1e-5)
    assert value(logs(skewed), logs(Q)) != pytest.approx(kl(skewed, Q), rel=1e-2)
    assert value(logs(P), logs(P)) == pytest.approx(0.0, abs=1e-7)


def test_temperature_softens_both_and_scales_by_its_square():
    def soft(p, t):
        weights = [v ** (1 / t) for v in p]
        return [w / sum(weights) for w in weights]

    expected = 4.0 * kl(soft(P, 2.0), soft(Q, 2.0))
    assert value(logs(Q), logs(P), temperature=2.0) == pytest.approx(expected, rel=1e-5)


def test_top_k_keeps_the_teachers_likeliest_renormalised():
    expected = kl([0.625, 0.375], Q[:2])  # 0.5 and 0.3 of 0.8; the head's own probabilities stay as they are
    assert value(logs(Q), logs(P), top_k=2) == pytest.approx(expected, rel=1e-5)
    assert value(logs(Q), logs(P), top_k=3) == value(logs(Q), logs(P), top_k=0)


def test_mean_over_rows():
    two = value(logs(Q) + logs(P), logs(P) + logs(P))
    assert two == pytest.approx(kl(P, Q) / 2, rel=1e-5)


def test_a_class_the_teacher_rules_out_adds_nothing():
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    head = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    found = create(Loss, "distill")([head], teacher)
    found.backward()
    assert found.item() == pytest.approx(kl([0.5, 0.5], [1 / (1 + math.e), math.e / (1 + math.e)]), rel=1e-5)
    assert head.grad.isfinite().all()


def test_weightings():
    q, uniform = logs(Q), kl(P, Q)
    predictions, final = [torch.tensor(q), torch.tensor(logs(P))], torch.tensor(logs(P))
    found = {
        w: float(create(Loss, "distill", weighting=w)(predictions, final)) for w in ("uniform", "linear", "inverse")
    }
    assert found == {
        "uniform": pytest.approx(uniform / 2, rel=1e-5),
        "linear": pytest.approx(uniform / 3, rel=1e-5),
        "inverse": pytest.approx(2 * uniform / 3, rel=1e-5),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"weighting": "linaer"}, "did you mean 'linear'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(offramp.OfframpError, match=message):
        create(Loss, "distill", **options)
