"""The two recursions over exits, against figures worked out by hand, and the draws."""

import pytest
import torch

from offramp.kernels.halting import draw, halting, joint


def test_halting_by_hand():
    p = halting(torch.tensor([0.1, 0.2, 0.4, 0.5, 0.3], dtype=torch.float64))
    wanted = [0.1, 0.18, 0.288, 0.216, 0.0648, 0.1512]
    assert p.tolist() == pytest.approx(wanted, abs=1e-12)
    assert p[:5].cumsum(0).tolist() == pytest.approx([0.1, 0.28, 0.568, 0.784, 0.8488], abs=1e-12)


def test_halting_is_a_distribution():
    p = halting(torch.rand(50, 7))
    assert torch.allclose(p.sum(-1), torch.ones(50)) and (p >= 0).all()
    assert halting(torch.tensor([1.0, 0.5])).tolist() == [1.0, 0.0, 0.0]
    assert halting(torch.tensor([0.0, 0.0])).tolist() == [0.0, 0.0, 1.0]


def test_the_joint_recursion_by_hand():
    mass, active = joint(torch.tensor([0.2, 0.5, 0.6, 0.9], dtype=torch.float64))
    assert mass.tolist() == pytest.approx([0.2, 0.5, 0.3, 0.0, 0.0], abs=1e-12)
    assert active.tolist() == pytest.approx([0.2, 0.625, 1.0, 0.0], abs=1e-12)


def test_activations_give_back_the_masses():
    """P_l is the chance to be left at l when every exit is left with chance a: the definition, run forwards."""
    gates = torch.rand(200, 6, dtype=torch.float64) * 0.3
    mass, active = joint(gates)
    assert torch.allclose(halting(active), mass, atol=1e-12)
    assert torch.allclose(mass.sum(-1), torch.ones(200, dtype=torch.float64)) and (mass >= 0).all()


def test_gradients_of_both_are_finite():
    gates = torch.rand(20, 4, requires_grad=True)
    (halting(gates)[:, 0].sum() + joint(gates)[0][:, :-1].square().sum()).backward()
    assert gates.grad.isfinite().all() and gates.grad.any()


def test_draws_are_even_and_follow_from_row_and_seed():
    chance = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = draw(chance, 0, 0)
    assert ((drawn >= 0) & (drawn < 1)).all() and torch.equal(drawn, draw(chance, 0, 0))
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02) and float(drawn.std()) == pytest.approx(0.2887, abs=0.02)
    for other in (draw(chance, 1, 0), draw(chance, 0, 1)):
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 0.04
    order = torch.randperm(len(chance))
    assert torch.equal(draw(chance[order], 0, 0), drawn[order])
    fired = (drawn < chance)[(chance > 0.2) & (chance < 0.4)]
    assert float(fired.double().mean()) == pytest.approx(0.3, abs=0.05)
