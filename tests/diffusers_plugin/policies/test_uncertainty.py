"""A trained module beside each exit says how wrong the answer would be, and rows stop by it."""

import pytest
import torch
from diffusers import DDPMScheduler

import offramp
from offramp._registry import create
from offramp.errors import BadArgument
from offramp.loss import Loss
from offramp_diffusers.tune_heads import tune_uncertainty


def noise(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def biased(exits, values):
    """Let each head estimate one number, whatever it sees."""
    with torch.no_grad():
        for depth, value in zip(exits.at, values, strict=True):
            exits[depth].estimate.bias.fill_(torch.tensor(value).logit())


def test_the_first_exit_below_the_threshold_is_taken(dit, batch):
    exits = offramp.attach(dit, at=[1, 3, 5], head="uncertainty")
    biased(exits, (0.3, 0.1, 0.05))
    with offramp.enable(dit, "uncertainty", threshold=0.2) as run:
        early = noise(dit, batch)
    assert run.stats.exits == {3: 4} and run.stats.blocks_run == 12
    with offramp.enable(dit, "fixed", depth=3):
        assert torch.equal(noise(dit, batch), early)
    with offramp.enable(dit, "uncertainty", threshold=[0.2, 0.01, 0.01]) as run:
        noise(dit, batch)
    assert run.stats.exits == {6: 4}


def test_rows_decide_alone_and_by_their_own_noise_level(dit, batch):
    exits = offramp.attach(dit, at=[2], head="uncertainty")
    with torch.no_grad():
        exits[2].estimate.weight[0, 16 + 15].fill_(4.0)  # the sine of the slowest period: rises with the level
    with offramp.enable(dit, "uncertainty", threshold=0.52) as run:
        together = noise(dit, batch)
        depths = run.stats.last_depths.tolist()
        assert len(set(depths)) == 2 and depths[3] == 2  # the cleanest row is the surest
        for i in range(4):
            alone = noise(dit, {k: v[i : i + 1] for k, v in batch.items()})
            assert run.stats.last_depths.tolist() == [depths[i]]
            assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_estimates_learn_the_error_of_their_exit(dit):
    exits = offramp.attach(dit, at=[2, 4], head="uncertainty")
    data = {"sample": torch.randn(32, 4, 8, 8), "class_labels": torch.arange(32) % 4}
    before = {k: v.clone() for k, v in dit.state_dict().items() if not k.startswith("exits.")}
    report = tune_uncertainty(dit, data, DDPMScheduler(), steps=80, lr=3e-2, batch_size=16, progress=False)
    assert sum(report.losses[-8:]) < 0.2 * sum(report.losses[:8])
    assert all(torch.equal(v, before[k]) for k, v in dit.state_dict().items() if k in before)
    assert report.parameters == sum(p.numel() for p in exits.modules.parameters())


def test_the_model_learns_too_where_asked(dit):
    offramp.attach(dit, at=[2], head="uncertainty")
    data = {"sample": torch.ones(16, 4, 8, 8), "class_labels": torch.arange(16) % 4}
    weight = dit.transformer_blocks[0].ff.net[2].weight.clone()
    options = {"form": "target", "plain": 1.0, "backbone": True}
    report = tune_uncertainty(dit, data, DDPMScheduler(), steps=80, lr=5e-3, batch_size=8, progress=False, **options)
    assert sum(report.losses[-5:]) < 0.8 * sum(report.losses[:5])
    assert not torch.equal(dit.transformer_blocks[0].ff.net[2].weight, weight)


def test_heads_that_estimate_nothing_are_refused(dit):
    offramp.attach(dit, at=[2], head="passthrough")
    with pytest.raises(BadArgument, match='attach head="uncertainty" and train them'):
        offramp.enable(dit, "uncertainty", threshold=0.1)
    with pytest.raises(BadArgument, match="estimate no error; attach"):
        tune_uncertainty(dit, {"sample": torch.zeros(4, 4, 8, 8)}, DDPMScheduler(), steps=1, progress=False)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, "a", []])
def test_bad_thresholds(threshold):
    with pytest.raises(BadArgument, match="uncertainty: threshold"):
        offramp.policy("uncertainty", threshold=threshold)


def test_both_published_forms():
    said, wanted = torch.zeros(1, 2), torch.full((1, 2), 0.5)
    target, u = torch.tensor(0.5).tanh(), torch.tensor([0.2])
    for form, whose in (("estimate", u[0]), ("target", target)):
        loss = create(Loss, "uncertainty_layerwise", form=form)
        wish = (u[0] - target) ** 2 + (1 - whose) * 0.25
        assert float(loss.estimated_at(said, wanted, u)) == pytest.approx(float(wish))
    with pytest.raises(BadArgument, match="form 'both' is not one of"):
        create(Loss, "uncertainty_layerwise", form="both")
    with pytest.raises(BadArgument, match="trusted must be a weight"):
        create(Loss, "uncertainty_layerwise", trusted=-1)
