"""Learned exits on real images: handwritten digits, read row by row of pixels."""

import pytest
import torch
from sklearn.datasets import load_digits

import offramp
from offramp.testing.policies import check_replay
from offramp.testing.toy import ToyModel

AT = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8)[order] / 16, torch.tensor(labels)[order]
    return {"x": x[:1200], "labels": y[:1200]}, {"x": x[1200:], "labels": y[1200:]}


@pytest.fixture
def trained(digits):
    """A model of 8 blocks whose last layer reads most digits; its exits are taken off again."""
    torch.manual_seed(0)
    model = ToyModel(depth=8, width=32, classes=10).eval()
    with offramp.attach(model, AT, head="linear"):
        offramp.fit(
            model, digits[0], loss="labels", schedule="joint", steps=400, lr=3e-3, batch_size=64, progress=False
        )
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "loss", "policy", "options"),
    [
        ("jei", "joint_exit", "jei", {"cost": 0.7}),
        ("lambda", "ponder", "quantile_halting", {"stop": 0.3, "beta": 0.1}),
    ],
)
def test_rows_leave_early_and_are_still_read(digits, trained, gate, loss, policy, options):
    """Half of the blocks or less, within 5 points of the full model, where a fixed depth of that cost is worse."""
    offramp.attach(trained, AT, head="linear", gate=gate)
    offramp.fit(trained, digits[0], loss=loss, steps=400, lr=1e-2, progress=False, **options)
    trace = offramp.record(trained, digits[1])
    full, found = offramp.simulate(trace, "never"), offramp.simulate(trace, policy)
    assert full.accuracy > 0.8 and found.saved > 0.5 and found.accuracy > full.accuracy - 0.05
    assert found.accuracy > offramp.simulate(trace, "fixed", depth=round(found.depth_mean)).accuracy
    check_replay(offramp.policy(policy), trained, digits[1]["x"], batch_size=64)
