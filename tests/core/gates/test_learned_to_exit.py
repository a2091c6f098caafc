"""A direction for all exits, or one for each."""

import pytest
import torch

from offramp.errors import BadArgument
from offramp.gating import build_gate


@torch.no_grad()
def test_shared_by_all_exits_or_one_each():
    hidden = torch.randn(4, 6)
    for per_exit in (False, True):
        gate = build_gate({"gate": "learned_to_exit", "per_exit": per_exit}, 6, 3)[0]
        assert gate.weight.shape == (3 if per_exit else 1, 6)
        gate.weight.normal_()
        gate.bias.normal_()
        said = [gate.log_odds(hidden, index) for index in range(3)]
        assert torch.equal(said[0], said[2]) is not per_exit


def test_an_option_that_is_none():
    with pytest.raises(BadArgument, match="per_exit must be True or False"):
        build_gate({"gate": "learned_to_exit", "per_exit": 1}, 6, 3)
