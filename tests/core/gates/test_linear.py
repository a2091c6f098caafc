"""A direction that all exits share."""

import torch
from torch.nn.functional import layer_norm

from offramp.gating import build_gate


@torch.no_grad()
def test_by_hand_and_whatever_the_scale_of_the_state():
    gate = build_gate("linear", 6, 3)[0]
    gate.weight.normal_()
    gate.bias.fill_(0.25)
    hidden = torch.randn(4, 6)
    wanted = layer_norm(hidden, (6,)) @ gate.weight[0] + 0.25
    for index in range(3):
        assert torch.allclose(gate.log_odds(hidden * 100 + 7, index), wanted, atol=1e-4)
