"""From what gates say at each exit to where a row leaves: two recursions over exits, one step of each and the whole."""

from __future__ import annotations

import torch
from torch import Tensor


def halting(chance: Tensor) -> Tensor:
    """Return the distribution over exits and the full model, [..., exits + 1]; the full model has what is left over.

    chance: [..., exits], lambda, the chance to stop at an exit after not having stopped before.
    """
    survival = (1 - chance).cumprod(-1)
    before = torch.cat([torch.ones_like(chance[..., :1]), survival[..., :-1]], -1)
    return torch.cat([chance * before, survival[..., -1:]], -1)


def joint_step(gate: Tensor, total: Tensor, survival: Tensor, single: bool = False) -> tuple[Tensor, Tensor]:
    """Return (probability P to leave here, activation a) of one exit, each [rows].

    gate: [rows]; total: sum of the gates before; survival: product of 1 - a over the exits before. P = max(0, min(gate,
    1 - total)) and a = P / survival, cut to [0, 1]; single: a = gate / survival instead, with P as before. Where
    nothing survives a is 0.
    """
    mass = torch.minimum(gate, 1 - total).clamp(min=0)
    alive = survival > 0
    active = torch.where(alive, (gate if single else mass) / torch.where(alive, survival, 1), 0).clamp(0, 1)
    return mass, active


def joint(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return (P [..., exits + 1] with the rest for the full model, a [..., exits]) of JEI-DNN's recursion.

    gates: [..., exits] in [0, 1].
    """
    total, survival = torch.zeros_like(gates[..., 0]), torch.ones_like(gates[..., 0])
    masses, actives = [], []
    for gate in gates.unbind(-1):
        mass, active = joint_step(gate, total, survival)
        total, survival = total + gate, survival * (1 - active)
        masses.append(mass)
        actives.append(active)
    mass = torch.stack(masses, -1)
    rest = (1 - mass.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([mass, rest], -1), torch.stack(actives, -1)


def draw(chance: Tensor, seed: int, index: int) -> Tensor:
    """Return a number in [0, 1[ per row [rows] that is spread evenly and follows from `chance`, `seed`, `index` alone.

    chance: [rows] in [0, 1]; equal chances draw equal numbers. The number moves little when the last digits of the
    chance do, which differ with the size of a batch: a replay then draws what the run drew.
    """
    turn = (1 + index + 64 * seed) * 0.6180339887498949 % 1  # the golden ratio spreads multiples of itself evenly
    # 4,096 turns: chances within a thousandth of one another still go round several times
    return (chance.double() * (4096 * (1 + turn)) + turn) % 1
