"""The solver is exact: no other table within the budget has a smaller error."""

import itertools

import pytest
import torch

from offramp.errors import BadArgument
from offramp_diffusers.fit_schedule import fit_schedule, visits


def brute(errors, budget, steps, weights, monotone):
    bins, depth = errors.shape
    best = None
    for plan in itertools.product(range(1, depth + 1), repeat=bins):
        if monotone and any(a < b for a, b in itertools.pairwise(plan)):
            continue
        if sum(s * k for s, k in zip(steps, plan, strict=True)) > budget * depth * sum(steps) + 1e-9:
            continue
        total = sum(w * float(errors[b, k - 1]) for b, (w, k) in enumerate(zip(weights, plan, strict=True)))
        best = total if best is None else min(best, total)
    return best


@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_table_within_the_budget_is_better(seed, monotone):
    make = torch.Generator().manual_seed(seed)
    errors = torch.rand(4, 5, generator=make, dtype=torch.float64)
    steps = torch.randint(1, 4, (4,), generator=make).tolist()
    budget = float(torch.rand((), generator=make)) * 0.6 + 0.3
    plan = fit_schedule(errors, budget, steps=steps, weights=steps, monotone=monotone)
    spent = sum(s * k for s, k in zip(steps, plan.depths, strict=True))
    assert spent <= budget * 5 * sum(steps) + 1e-9
    got = sum(s * float(errors[b, k - 1]) for b, (s, k) in enumerate(zip(steps, plan.depths, strict=True)))
    assert got == pytest.approx(brute(errors, budget, steps, steps, monotone))


def test_noise_that_needs_no_depth_gets_none():
    """Errors that fall with depth in the clean bin only: all the budget goes there."""
    errors = torch.tensor([[9.0, 4.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    assert fit_schedule(errors, 0.625).depths == (4, 1)
    assert fit_schedule(errors, 1.0).depths == (4, 1)  # of equal tables the shallowest


def test_errors_count_by_how_far_they_are_above_the_full_models():
    """Two bins that gain as much from depth, one with a thousand times the error: they get the same depth."""
    row = torch.tensor([4.0, 2.0, 1.2, 1.0])
    errors = torch.stack([1000 * row, row])
    assert fit_schedule(errors, 0.5).depths == (2, 2)
    assert fit_schedule(errors, 0.5, weights=[1, 1]).depths == (3, 1)


def test_depths_cost_what_they_run():
    """Of a U-ViT: depths 1 and 2 run two and four blocks, and the schedule is in depths."""
    errors = torch.tensor([[4.0, 2.0, 1.0], [4.0, 1.1, 1.0]])
    stops = {1: 2, 2: 4, 8: 8}
    assert fit_schedule(errors, 0.75, stops=stops).depths == (8, 2)
    assert fit_schedule(errors, 0.5, stops=stops).depths == (2, 2)
    assert fit_schedule(errors, 0.25, stops=stops).depths == (1, 1)


def test_steps_are_counted_by_bin():
    assert visits([0, 99, 100, 999, 1000], 10) == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    with pytest.raises(BadArgument, match="at least one noise level"):
        visits([1500], 10)


@pytest.mark.parametrize(
    ("errors", "options", "match"),
    [
        (torch.rand(3), {"budget": 0.5}, "must be a finite tensor"),
        (torch.full((2, 2), float("nan")), {"budget": 0.5}, "must be a finite tensor"),
        (torch.rand(2, 4), {"budget": 0.0}, "share of blocks"),
        (torch.rand(2, 4), {"budget": 1.5}, "share of blocks"),
        (torch.rand(2, 4), {"budget": 0.2}, "fewer than 1 each; give at least 0.25"),
        (torch.rand(2, 2), {"budget": 0.2, "stops": {1: 2, 8: 8}}, "fewer than 2 each; give at least 0.25"),
        (torch.rand(2, 4), {"budget": 0.5, "stops": {1: 2, 8: 8}}, "each of the 4 depths"),
        (torch.rand(2, 2), {"budget": 0.5, "stops": {8: 8, 1: 2}}, "rising"),
        (torch.rand(2, 4), {"budget": 0.5, "steps": [1]}, "one number from 0 on for each of the 2 bins"),
        (torch.rand(2, 4), {"budget": 0.5, "steps": [0, 0]}, "one number from 0 on"),
        (torch.rand(2, 4), {"budget": 0.5, "weights": [1.0, -1.0]}, "one number from 0 on"),
    ],
)
def test_bad_input(errors, options, match):
    with pytest.raises(BadArgument, match=match):
        fit_schedule(errors, **options)
