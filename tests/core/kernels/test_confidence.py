"""Statistics of logits against their definitions in float64, in every type."""

import pytest
import torch

from offramp.kernels.confidence import PREDICTION, confidence, cosine

SHAPES = [(1, 1), (1, 2), (3, 5), (7, 127), (2, 1000), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(dtype, shape):
    logits = (3 * torch.randn(shape)).to(dtype)
    p = logits.double().softmax(-1)
    pair = p.topk(min(2, shape[1]), -1).values
    sharp = p.square() / p.square().sum(-1, keepdim=True)
    wanted = {
        "top1": pair[:, 0],
        "margin": pair[:, 0] - pair[:, 1] if shape[1] > 1 else pair[:, 0],
        "entropy": torch.special.entr(p).sum(-1),
        "sharpened": torch.special.entr(sharp).sum(-1),
        "energy": -logits.double().logsumexp(-1),
    }
    found = confidence(logits, PREDICTION)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)
    assert (logits.gather(1, found["label"][:, None])[:, 0] == logits.amax(-1)).all()


@pytest.mark.parametrize("name", sorted(PREDICTION))
def test_gives_what_is_asked_for(name):
    assert name in confidence(torch.randn(2, 3), {name})


def test_cosine():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(cosine(a, torch.tensor([[2.0, 0.0], [0.0, 3.0]])), torch.tensor([1.0, 0.0]))
