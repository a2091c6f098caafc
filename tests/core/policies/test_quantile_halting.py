"""Exits at a quantile of the halting distribution, and by draws, by hand."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.halting import expectation
from offramp.kernels.halting import halting
from offramp.policy import Evidence

LAMBDA = [0.1, 0.2, 0.4, 0.5, 0.3]


def first(chances, **options):
    """The first exit at which each row of lambdas [rows, exits] stops, or how many exits there are for none."""
    policy = offramp.policy("quantile_halting", **options)
    chances = torch.as_tensor(chances)
    state, out = policy.start(len(chances), "cpu"), torch.full((len(chances),), chances.shape[1])
    for i, chance in enumerate(chances.unbind(1)):
        stop, state = policy.step(state, Evidence(i, i + 1, i == 0, False, stats={"lambda": chance}))
        out = torch.where(stop, out.clamp(max=i), out)
    return out


@pytest.mark.parametrize(("q", "index"), [(0.05, 0), (0.2, 1), (0.5, 2), (0.6, 3), (0.8, 4), (0.9, 5)])
def test_the_quantile_by_hand(q, index):
    assert first([LAMBDA], threshold=q).tolist() == [index]


def test_the_default_is_the_median():
    assert first([LAMBDA]).tolist() == [2]


def test_a_row_with_nan_stays():
    nan = float("nan")
    assert first([[nan, 1.0], [0.1, nan], [0.1, 0.9]]).tolist() == [2, 2, 1]
    assert first([[nan, 1.0], [0.1, nan]], rule="sample").tolist()[0] == 2


def test_draws_follow_the_distribution():
    make = torch.Generator().manual_seed(0)
    chances = torch.tensor(LAMBDA) + 0.05 * torch.rand(20_000, 5, generator=make)
    found = torch.bincount(first(chances, rule="sample"), minlength=6) / len(chances)
    assert found.tolist() == pytest.approx(halting(chances).mean(0).tolist(), abs=0.02)
    again, other = first(chances, rule="sample"), first(chances, rule="sample", seed=1)
    assert torch.equal(again, first(chances, rule="sample")) and not torch.equal(again, other)
    with pytest.raises(BadArgument, match="no threshold to calibrate"):
        offramp.policy("quantile_halting", rule="sample").ladder((2, 4), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, r"threshold 1 is outside \[0, 1\["),
        ({"threshold": [0.5, -0.1]}, "outside"),
        ({"rule": "mean"}, "rule 'mean' is not one of quantile, sample"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_what_says_nothing(options, message):
    with pytest.raises(BadArgument, match=message):
        offramp.policy("quantile_halting", **options)


def test_the_expectation_is_the_mean_answer_of_the_draws():
    logits, chance = torch.randn(3, 4, 5), torch.rand(3, 4)
    stats = {"lambda": chance, "top1": torch.ones(3, 4)}
    trace = offramp.Trace((1, 2, 3, 4), stats, label=logits.argmax(-1), classes=5, logits=logits)
    said = expectation(trace)
    p = logits.double().softmax(-1)
    a, b, c = chance[:, :3].double().unbind(1)
    wanted = torch.stack([a, (1 - a) * b, (1 - a) * (1 - b) * c, (1 - a) * (1 - b) * (1 - c)], 1)
    assert torch.allclose(said, (p * wanted[..., None]).sum(1)) and torch.allclose(said.sum(-1), torch.ones(3).double())
    bare = offramp.Trace((1, 2, 3, 4), {"top1": torch.ones(3, 4)}, label=logits.argmax(-1), classes=5)
    with pytest.raises(BadArgument, match="logits=True"):
        expectation(bare)
