"""The threshold estimator on mixtures that are known, by hand and at its edges; the policy around it."""

import numpy as np
import pytest
import torch
from scipy.stats import beta

import offramp
from offramp.errors import BadArgument
from offramp.policies.beta_mixture import assign, choose, fit_moments, log_density
from offramp.policy import Evidence, Feedback

WRONG, RIGHT = (2.0, 4.0), (8.0, 2.0)


def planted(n, share=0.5):
    """Scores of n answers of which a share is right."""
    draw = np.random.default_rng(0)
    right = draw.uniform(size=n) < share
    return np.where(right, draw.beta(*RIGHT, size=n), draw.beta(*WRONG, size=n)), right


def told(score, right):
    stats = {"margin": torch.as_tensor(score, dtype=torch.float32)}
    return Feedback(0, correct=torch.as_tensor(right), stats=stats)


def by_density(zeta):
    """The threshold that the true densities give, point by point."""
    grid = np.linspace(0.3, 0.9, 10)
    f0, f1 = beta.pdf(grid, *WRONG), beta.pdf(grid, *RIGHT)
    return grid[min(9, 10 - int((f1 / (f0 + f1) > zeta).sum()))]


@pytest.mark.parametrize("zeta", [0.4, 0.6, 0.8])
def test_it_recovers_a_planted_mixture(zeta):
    policy = offramp.policy("beta_mixture", zeta=zeta)
    state, (score, right) = policy.start(1, "cpu"), planted(4000)
    for part in np.split(np.arange(4000), 40):
        state = policy.learn(state, told(score[part], right[part]))
    shape = state["shape"][0].numpy()
    means = shape[:, 0] / shape.sum(1)
    assert means == pytest.approx([2 / 6, 8 / 10], abs=0.05)
    assert state["sums"][0, :, 0].tolist() == pytest.approx([2000, 2000], rel=0.1)
    step = 0.6 / 9
    assert float(state["threshold"]) == pytest.approx(by_density(zeta), abs=1.01 * step)


def test_with_labels_alone_it_recovers_any_share():
    """With mix 0 each pair goes where its label says: the moments are the sample's, but for the pairs of the start."""
    policy, (score, right) = offramp.policy("beta_mixture", mix=0.0), planted(4000, share=0.8)
    shape = policy.learn(policy.start(1, "cpu"), told(score, right))["shape"][0]
    assert shape.flatten().tolist() == pytest.approx([*WRONG, *RIGHT], rel=0.1)


def test_kept_sums_come_near_to_going_through_all_pairs_again():
    policy, (score, right) = offramp.policy("beta_mixture"), planted(4000, share=0.7)
    state, x = policy.start(1, "cpu"), torch.as_tensor(score, dtype=torch.float32)
    shape, powers = state["shape"], torch.stack([torch.ones_like(x), x, x * x], -1)
    for part in np.split(np.arange(4000), 40):
        state = policy.learn(state, told(score[part], right[part]))
        seen = slice(0, part[-1] + 1)
        shape = fit_moments(assign(shape, x[seen], torch.as_tensor(right)[seen], 0.8) @ powers[seen])
    means = [s[..., 0] / s.sum(-1) for s in (shape, state["shape"])]
    assert torch.allclose(*means, atol=0.02) and torch.equal(choose(shape, 0.4), state["threshold"])


def test_where_answers_are_better_the_threshold_is_lower():
    found = []
    for wrong in (WRONG, (1.0, 12.0)):
        draw, policy = np.random.default_rng(0), offramp.policy("beta_mixture")
        right = draw.uniform(size=2000) < 0.7
        score = np.where(right, draw.beta(*RIGHT, size=2000), draw.beta(*wrong, size=2000))
        found.append(float(policy.learn(policy.start(1, "cpu"), told(score, right))["threshold"]))
    assert found[1] < found[0]


def test_densities_are_scipys():
    grid = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    shape = torch.tensor([WRONG, RIGHT], dtype=torch.float64)
    wanted = np.stack([beta.logpdf(grid.numpy(), *WRONG), beta.logpdf(grid.numpy(), *RIGHT)])
    assert log_density(shape, grid).numpy() == pytest.approx(wanted)


def test_label_and_likelihood_are_mixed():
    """A pair at the score where both densities are alike: 0.8 / 2 + 0.2 for its own label, 0.8 / 2 for the other."""
    shape = torch.tensor([(1.0, 2.0), (2.0, 1.0)])
    found = assign(shape, torch.tensor([0.5, 0.5, 0.9]), torch.tensor([True, False, False]), 0.8)
    assert found[:, 0].tolist() == pytest.approx([0.4, 0.6]) and found[:, 1].tolist() == pytest.approx([0.6, 0.4])
    assert found[:, 2].tolist() == pytest.approx([0.8 * 0.1 + 0.2, 0.8 * 0.9])  # 2 (1 - x) and 2 x at x = 0.9


def test_moments_by_hand():
    """Mean 0.5 and variance 0.05 are those of Beta(2, 2)."""
    assert fit_moments(torch.tensor([10.0, 5.0, 3.0])).tolist() == pytest.approx([2.0, 2.0], rel=1e-5)


def test_a_start_has_the_moments_of_its_distributions():
    state = offramp.policy("beta_mixture", threshold=0.8).start(3, "cpu")
    assert state["threshold"].tolist() == pytest.approx([0.8] * 3)
    assert torch.allclose(fit_moments(state["sums"]), state["shape"], rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "threshold"),
    [
        ([(1.0, 2.0), (2.0, 1.0)], 0.9 - 0.6 * 7 / 9),  # 2 x / 2 > 0.4 from 0.4 on, which is no more than 0.4 itself
        ([(2.0, 1.0), (1.0, 2.0)], 0.9 - 0.6 * 7 / 9),  # the same with the two exchanged
        ([(1.0, 90.0), (90.0, 1.0)], 0.9 - 0.6 * 5 / 9),
        ([(60.0, 3.0), (3000.0, 3.0)], 0.9),  # no point of the grid is the right ones'
        ([(1.0, 1e4), (2.0, 1.0)], 0.3),
    ],
)
def test_thresholds_by_hand(shape, threshold):
    assert float(choose(torch.tensor(shape), 0.4)) == pytest.approx(threshold, abs=0.6 / 9 + 1e-6)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("score", [0.0, 1.0, 0.95])
def test_odd_feedback_gives_a_finite_state(score, right):
    policy = offramp.policy("beta_mixture")
    state = policy.start(2, "cpu")
    assert policy.learn(state, Feedback(0)) is state and policy.learn(state, told([], [])) is state
    for _ in range(50):
        state = policy.learn(state, told([score] * 20, [right] * 20))
    assert all(bool(v.isfinite().all()) for v in state.values())
    assert 0.3 <= float(state["threshold"][0]) <= 0.9


def test_rows_stop_at_the_threshold_as_it_stands():
    policy = offramp.policy("beta_mixture", threshold=0.6, on="top1")
    seen = Evidence(0, 2, True, True, stats={"top1": torch.tensor([0.5, 0.6, 0.7, float("nan")])})
    state = policy.start(4, "cpu")
    assert policy.step(state, seen)[0].tolist() == [False, True, True, False]
    moved = {**state, "threshold": torch.tensor([0.4, 0.8, 0.4, 0.4])}
    assert policy.step(moved, seen)[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": [0.5, 0.6]}, "share one threshold"),
        ({"threshold": 1.5}, "outside"),
        ({"on": "entropy"}, "is no score"),
        ({"mix": 1.2}, "mix must be"),
        ({"zeta": "0.4"}, "zeta must be"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(BadArgument, match=message):
        offramp.policy("beta_mixture", **options)


def test_a_moving_threshold_is_not_calibrated():
    with pytest.raises(BadArgument, match="no promise about it would last"):
        offramp.policy("beta_mixture").ladder([2, 4], 5)


def test_wrappers_know_whether_they_learn():
    inner = offramp.policy("beta_mixture")
    still = offramp.policy("confidence", threshold=0.5)
    assert inner.learns() and not still.learns()
    assert offramp.policy("at_least", inner=inner, depth=2).learns()
    assert not offramp.policy("at_least", inner=still, depth=2).learns()
    assert offramp.policy("any_of", policies=[still, inner]).learns()
    assert not offramp.policy("all_of", policies=[still, still]).learns()
    with pytest.raises(BadArgument, match="learns from statistics at temperature 1"):
        offramp.policy("tempered", inner=inner, temperature=2.0)
