"""A real trace: handwritten digits, and a perceptron with an exit after each of its first three layers."""

import pytest
import torch
from torch import nn

from offramp import Trace
from offramp.kernels.confidence import confidence


def digits_trace(steps=100, width=8):
    """Train on 600 rows of scikit-learn's digits; the other 1,197 are the trace."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    x, y = (torch.tensor(v) for v in load_digits(return_X_y=True))
    order = torch.randperm(len(x))
    x, y = (x[order] / 16).float(), y[order].long()
    layers = nn.ModuleList([nn.Linear(64 if i == 0 else width, width) for i in range(4)])
    heads = nn.ModuleList([nn.Linear(width, 10) for _ in range(4)])

    def said(x):
        out = []
        for layer, head in zip(layers, heads, strict=True):
            x = layer(x).relu()
            out.append(head(x))
        return torch.stack(out, 1)

    optimiser = torch.optim.Adam([*layers.parameters(), *heads.parameters()], lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(said(x[:600]).flatten(0, 1), y[:600].repeat_interleave(4)).backward()
        optimiser.step()
    with torch.no_grad():
        logits = said(x[600:])
    targets = y[600:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.repeat_interleave(4), reduction="none")
    stats = confidence(logits, {"top1", "margin", "entropy", "label"})
    label = stats.pop("label")
    return Trace((1, 2, 3, 4), stats, label, 10, targets=targets, losses=losses.view(-1, 4), logits=logits)


@pytest.fixture(scope="session")
def digits():
    return digits_trace()


@pytest.fixture
def draws(digits):
    """`draws(trials, rows)`: traces of rows drawn with replacement, for which all of `digits` is the population."""

    def make(trials, rows, seed=0):
        chance = torch.Generator().manual_seed(seed)
        for _ in range(trials):
            yield digits[torch.randint(len(digits), (rows,), generator=chance)]

    return make
