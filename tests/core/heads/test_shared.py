"""The logit lens as a head: nothing of its own, and always what the model's readout is now."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.fit import trainable


def test_it_is_the_models_readout_also_after_that_has_changed(model):
    exits = offramp.attach(model, [2, 4], head="shared")
    hidden = torch.randn(3, 2, 16)
    for _ in range(2):
        assert torch.equal(exits[2](hidden), model.head(model.norm(hidden)))
        with torch.no_grad():
            model.norm.weight.normal_()
            model.head.weight.normal_()


def test_it_adds_no_weight_and_no_key(model, tmp_path):
    keys = list(model.state_dict())
    exits = offramp.attach(model, [2, 4], head="shared")
    assert list(model.state_dict()) == keys and not list(model.exits.parameters())
    assert not trainable(exits) and not exits[2].own_state()
    exits.save(tmp_path)
    exits.detach()
    assert offramp.load(model, tmp_path).head == "shared"


def test_heads_alone_have_nothing_to_train(model):
    offramp.attach(model, [2], head="shared")
    with pytest.raises(BadArgument, match="'shared' has no weights of its own to train here.*backbone=True"):
        offramp.fit(model, torch.randn(20, 3, 8), steps=1, progress=False)
