import pytest
import torch

import offramp
from offramp._registry import create
from offramp.errors import BadArgument
from offramp.loss import Loss
from offramp.testing.toy import ToyModel


def test_cross_entropy_by_hand():
    loss = create(Loss, "speculative_gate")
    logits, hits = [torch.tensor([0.0, 2.0])], torch.tensor([[True], [False]])
    wanted = (torch.log(torch.tensor(2.0)) + torch.log1p(torch.tensor(2.0).exp())) / 2
    assert float(loss.each(logits, torch.zeros(2, 3), hits)[0]) == pytest.approx(float(wanted))


def test_targets_are_whether_each_exit_agrees_with_the_full_model():
    model, data = ToyModel().eval(), torch.randn(40, 3, 8)
    exits = offramp.attach(model, [1, 3], head="speculative", candidates=3, hidden=8)
    seen = exits.backbone.observe(data, exits.at)
    final = exits.backbone.context().readout(seen.final)
    logits, hits, _ = create(Loss, "speculative_gate").read(exits, seen.hidden, final, None, range(2))
    trace = offramp.record(model, data)
    assert torch.equal(hits, trace.label[:, :-1] == trace.label[:, -1:])
    assert [x.shape for x in logits] == [(40,)] * 2 and all(x.requires_grad for x in logits)


def test_it_needs_to_know_what_is_right():
    with pytest.raises(BadArgument, match="which exits are right"):
        create(Loss, "speculative_gate").each([torch.zeros(2)], torch.zeros(2, 3), None)
