"""Output layers of the exit's own: the model's at first, then trained, for the rows that leave there."""


import pytest
import torch
from diffusers import DDPMScheduler

import offramp
from offramp._plugins import adapt
from offramp.errors import BadArgument
from offramp_diffusers import facts
from offramp_diffusers.facts import ModelFacts, model_facts
from offramp_diffusers.tune_heads import tune_heads, tune_uncertainty


def said(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.sample


def shaken(exits):
    """Give the copies weights of their own."""
    with torch.no_grad():
        for depth in exits.at:
            for p in exits[depth].layers.parameters():
                p.add_(torch.randn_like(p) * 0.2)


def test_untrained_it_is_the_models_own_and_trained_it_answers_alone(family, cut, running, marks):
    model, batch = family
    given, before, full = batch(2), marks(model), said(model, batch(2))
    full = said(model, given)
    bare = said(cut(model, 2), given)
    exits = offramp.attach(model, at=[2], head="output")
    with offramp.enable(model, "fixed", depth=2) as run:
        assert torch.equal(said(model, given), bare) and run.stats.blocks_run == 2 * len(running(model, 2))
    shaken(exits)
    layers = dict(exits[2].layers.items())
    wanted = said(cut(model, 2, layers), given)
    with offramp.enable(model, "fixed", depth=2):
        assert torch.equal(said(model, given), wanted) and not torch.equal(wanted, bare)
    with offramp.enable(model, "never"):
        assert torch.equal(said(model, given), full)
    exits.detach()
    assert torch.equal(said(model, given), full) and marks(model) == before


def test_every_row_is_answered_by_its_own_exit(family, cut):
    model, batch = family
    if not adapt(model).timed:
        return
    kind, given, depth = model_facts(model), batch(3), adapt(model).depth
    scale = kind.full * (model.config[kind.scaled_by] if kind.scaled_by else 1)
    levels = torch.tensor([0.1, 0.9, 0.5]) if not kind.rising else torch.tensor([0.9, 0.1, 0.5])
    given["timestep"] = levels * scale
    exits = offramp.attach(model, at=[2, 3], head="output")
    shaken(exits)
    short = {d: cut(model, d, dict(exits[d].layers.items())) for d in (2, 3)}
    with offramp.enable(model, "time_schedule", depths=(depth, 3, 2)) as run:
        together = said(model, given)
    assert run.stats.last_depths.tolist() == [depth, 2, 3]
    exits.detach()
    for row, alone in enumerate((model, short[2], short[3])):
        assert torch.allclose(together[row], said(alone, given)[row], atol=1e-5)


def test_training_changes_the_copies_alone(dit, batch, make, tmp_path):
    exits = offramp.attach(dit, at=[2, 4], head="output")
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    data = {"sample": torch.ones(16, 4, 8, 8), "class_labels": torch.arange(16) % 4}
    scheduler = DDPMScheduler(prediction_type="sample")
    report = tune_heads(dit, data, scheduler, steps=60, lr=3e-2, batch_size=8, progress=False)
    assert sum(report.losses[-6:]) < 0.5 * sum(report.losses[:6])
    changed = {k for k, v in dit.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(".layers." in k for k in changed)
    exits.save(tmp_path)
    other = make()
    again = offramp.load(other, tmp_path)
    other.load_state_dict(dit.state_dict())
    ways = ({"policy": "fixed", "depth": 2}, {"policy": "fixed", "depth": 4})
    for way in ways:
        with offramp.enable(dit, way), offramp.enable(other, way):
            assert torch.equal(said(dit, batch), said(other, batch))
    assert again.at == (2, 4)


def test_estimates_go_with_output_layers_of_their_own(dit, batch, cut):
    exits = offramp.attach(dit, at=[2, 4], head="uncertainty", output=True)
    data = {"sample": torch.ones(16, 4, 8, 8), "class_labels": torch.arange(16) % 4}
    start = exits[2].layers["proj_out_2"].weight.clone()
    model = {k: v.clone() for k, v in dit.state_dict().items() if not k.startswith("exits.")}
    tune_uncertainty(dit, data, DDPMScheduler(), steps=4, lr=1e-2, batch_size=4, progress=False)
    assert not torch.equal(exits[2].layers["proj_out_2"].weight, start)
    assert all(torch.equal(dit.state_dict()[k], v) for k, v in model.items())
    short = cut(dit, 2, dict(exits[2].layers.items()))
    with offramp.enable(dit, "uncertainty", threshold=1.0):
        early = said(dit, batch)
    assert torch.equal(early, said(short, batch))


def test_what_cannot_be_copied_is_refused(dit, marks, monkeypatch):
    before = marks(dit)
    with offramp.enable(dit, "time_schedule"), pytest.raises(BadArgument, match="norm_out of .* hooks.*attach these"):
        offramp.attach(dit, at=[2], head="output")
    assert marks(dit) == before
    monkeypatch.setitem(facts.MODELS, "DiTTransformer2DModel", ModelFacts(("transformer_blocks",)))
    with pytest.raises(BadArgument, match=r"declare\(DiTTransformer2DModel, ModelFacts\(..., output="):
        offramp.attach(dit, at=[2], head="output")
    assert marks(dit) == before


def test_a_schedule_needs_one_at_each_of_its_depths(dit):
    offramp.attach(dit, at=[2], head="output")
    with pytest.raises(BadArgument, match=r"stops at \[3\], where no head was attached"):
        offramp.enable(dit, "time_schedule", depths=[6, 3, 2])
