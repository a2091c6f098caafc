"""Exits by the energy of the logits, by hand."""

import math

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.kernels.confidence import confidence
from offramp.policy import Evidence


def test_the_energy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [5.0, 0.0], [math.log(3), float("-inf")], [float("nan"), 0.0]])
    energy = confidence(logits, {"energy"})["energy"]
    assert energy[:3].tolist() == pytest.approx([-math.log(2), -math.log(math.exp(5) + 1), -math.log(3)], abs=1e-6)
    seen = Evidence(0, 2, True, False, stats={"energy": energy})
    assert offramp.policy("energy", threshold=-1.0).step({}, seen)[0].tolist() == [False, True, True, False]


def test_it_follows_the_scale_and_not_the_shift_of_confidence():
    """Two rows of equal probabilities and different energies: what a softmax cannot tell apart."""
    logits = torch.tensor([[1.0, 0.0], [11.0, 10.0]])
    found = confidence(logits, {"energy", "top1"})
    assert found["top1"][0].item() == pytest.approx(found["top1"][1].item())
    assert (found["energy"][0] - found["energy"][1]).item() == pytest.approx(10.0, abs=1e-5)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -1e9, "low", []])
def test_a_threshold_that_could_never_act(threshold):
    with pytest.raises(BadArgument, match="energy: threshold"):
        offramp.policy("energy", threshold=threshold)
