"""Every family with facts keeps one contract: what is skipped did not run, and what comes out is a shorter model's."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import offramp
from offramp._plugins import adapt
from offramp.errors import BadArgument, UnsupportedModel
from offramp.testing.backbones import check_backbone
from offramp_diffusers import facts
from offramp_diffusers.facts import BlockFacts, ModelFacts, block_facts, declare, model_facts, noise_level

#: families whose blocks read one state, and those whose blocks read more, and what
ONE_STATE = ("dit_family", "pixart", "pixart_alpha", "sana", "wan", "ltx", "uvit", "lumina2")
MORE = {
    **dict.fromkeys(("sd3", "flux", "qwenimage", "hunyuanvideo", "cogvideox", "auraflow"), "the text's state"),
    "hunyuandit": r"states of earlier blocks \(long skips\)",
}
#: families whose calls carry no noise level, and the others
UNTIMED = ("uvit",)
TIMED = [name for name in (*ONE_STATE, *MORE) if name not in UNTIMED]


def said(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.sample


def schedule(depth):
    return offramp.policy("time_schedule", depths=(depth,))


def ways(model, depth):
    """Both ways to a depth: by the noise level where there is one, and by an exit."""
    if adapt(model).timed:
        yield offramp.enable(model, schedule(depth))
    if depth < adapt(model).depth:
        exits = offramp.attach(model, at=[depth], head="passthrough")
        yield offramp.enable(model, "fixed", depth=depth)
        exits.detach()


def count_leaves(model):
    """Count the calls of modules without children, by the index of the block they are in."""
    ran, handles = Counter(), []
    for index, block in enumerate(adapt(model).blocks()):
        for module in block.modules():
            if not list(module.children()):
                hook = lambda *_, i=index: ran.update([i])  # noqa: E731
                handles.append(module.register_forward_hook(hook))
    return ran, lambda: [h.remove() for h in handles]


def test_a_skipped_block_does_not_run_and_the_rest_is_the_truncated_model(family, cut, running):
    model, batch = family
    given, total = batch(2), adapt(model).depth
    for depth in range(1, total + 1):
        wanted = said(cut(model, depth), given)
        for run in ways(model, depth):
            with run:
                ran, undo = count_leaves(model)
                got = said(model, given)
                undo()
            assert torch.equal(got, wanted), depth
            assert sorted(ran) == running(model, depth)
            assert (run.stats.blocks_run, run.stats.blocks_full) == (2 * len(ran), 2 * total)
            assert run.stats.last_depths.tolist() == [depth] * 2


def flops(model, batch):
    with FlopCounterMode(display=False) as counter:
        said(model, batch)
    return counter.get_total_flops()


def test_it_computes_as_much_as_the_truncated_model_and_not_more(family, cut, running):
    model, batch = family
    given, found = batch(2), []
    for depth in range(1, adapt(model).depth + 1):
        wanted = flops(cut(model, depth), given)
        for run in ways(model, depth):
            with run:
                assert flops(model, given) == wanted
        found.append((len(running(model, depth)), wanted))
    assert [n for n, _ in sorted(found)] == [n for n, _ in sorted(found, key=lambda one: one[1])]
    assert len({computed for _, computed in found}) == len(found)


def test_undo_is_exact_and_never_changes_nothing(family, marks):
    model, batch = family
    given, before = batch(2), marks(model)
    full = said(model, given)
    exits = offramp.attach(model, at=[2], head="passthrough")
    with offramp.enable(model, "never") as run:
        assert torch.equal(said(model, given), full) and run.stats.saved == 0
    with offramp.enable(model, "fixed", depth=2):
        assert not torch.equal(said(model, given), full)
    assert torch.equal(said(model, given), full)
    exits.detach()
    assert marks(model) == before


@pytest.mark.parametrize("family", TIMED, indirect=True)
def test_rows_with_depths_of_their_own_are_those_rows_alone(family, cut):
    model, batch = family
    kind = model_facts(model)
    given, depth = batch(3), adapt(model).depth
    scale = kind.full * (model.config[kind.scaled_by] if kind.scaled_by else 1)
    levels = torch.tensor([0.1, 0.9, 0.5]) if not kind.rising else torch.tensor([0.9, 0.1, 0.5])
    given["timestep"] = levels * scale
    plan = offramp.policy("time_schedule", depths=(depth, 3, 2))
    with offramp.enable(model, plan) as run:
        together = said(model, given)
    assert run.stats.last_depths.tolist() == [depth, 2, 3]
    for row, depth in enumerate(run.stats.last_depths.tolist()):
        whole = said(cut(model, depth), given)
        assert torch.allclose(together[row], whole[row], atol=1e-5)


@pytest.mark.parametrize("family", UNTIMED, indirect=True)
def test_a_model_without_noise_levels_has_no_schedule(family):
    model, _ = family
    with pytest.raises(BadArgument, match="calls of UVit2DModel carry none"):
        offramp.enable(model, "time_schedule", depths=(2,))


def test_deep_copies_are_exact_and_independent(family):
    model, batch = family
    given = batch(2)
    exits = offramp.attach(model, at=[2], head="passthrough")
    run = offramp.enable(model, "fixed", depth=2)
    early, other = said(model, given), copy.deepcopy(model)
    with torch.no_grad():
        for p in adapt(other).blocks()[0].parameters():
            p.add_(0.5)
    assert not torch.equal(said(other, given), early) and run.stats.rows == 2
    assert torch.equal(said(model, given), early)
    exits.detach()


def test_every_family_is_of_one_kind_or_the_other(families):
    assert sorted([*TIMED, *UNTIMED]) == sorted([*ONE_STATE, *MORE]) == sorted(families)


@pytest.mark.parametrize("family", ONE_STATE, indirect=True)
def test_the_backbone_keeps_its_contract_where_blocks_read_one_state(family):
    model, batch = family
    check_backbone(adapt(model), batch(2))


@pytest.mark.parametrize(("family", "what"), MORE.items(), indirect=["family"])
def test_no_window_starts_in_the_middle_where_blocks_read_more(family, what):
    model, batch = family
    backbone, given = adapt(model), batch(2)
    full, depth = said(model, given), backbone.depth
    for start in (1, depth - 1):
        with (
            pytest.raises(BadArgument, match=f"blocks of this model also read {what}, which no window hands on"),
            backbone.window(start, depth, torch.zeros(2, 4, backbone.width)),
        ):
            said(model, given)
    with backbone.window(0, depth) as kept:
        assert torch.equal(said(model, given), full)
    with backbone.window(depth, depth, kept["hidden"]):
        assert torch.allclose(said(model, given), full, rtol=1e-4, atol=1e-5)
    assert torch.equal(said(model, given), full)


def test_strangers_are_declared_in_one_call(family, monkeypatch):
    model, batch = family
    monkeypatch.setattr(facts, "MODELS", dict(facts.MODELS))
    monkeypatch.setattr(facts, "BLOCKS", dict(facts.BLOCKS))
    known = model_facts(model)
    stranger = type("Stranger", (nn.Module,), {"__module__": "diffusers.models.mine"})()
    with pytest.raises(UnsupportedModel, match=r"Stranger is a diffusers model .*declare\(Stranger, ModelFacts"):
        model_facts(stranger)
    declare(type(stranger), known)
    assert model_facts(stranger) is known
    with pytest.raises(UnsupportedModel, match=r"neither diffusers' table .*declare\(Linear, BlockFacts\(\)\)"):
        block_facts(nn.Linear(2, 2))
    declare(nn.Linear, BlockFacts(argument="input"))
    assert block_facts(nn.Linear(2, 2)).argument == "input"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (500, [500.0]),
        (torch.tensor(999), [999.0]),
        (torch.tensor([0.0, 1000.0]), [0.0, 1000.0]),
        (torch.tensor([[0, 0, 700], [0, 20, 10]]), [700.0, 20.0]),
        (torch.tensor([999.0], dtype=torch.bfloat16), [1000.0]),
    ],
)
def test_noise_levels(given, wanted):
    assert noise_level(ModelFacts(("blocks",)), {}, given) == wanted


def test_noise_levels_on_other_scales():
    assert noise_level(ModelFacts((), full=1.0, rising=True), {}, 0.25) == [750.0]
    assert noise_level(ModelFacts((), scaled_by="scale"), {"scale": 0.001}, 0.25) == [250.0]


@pytest.mark.parametrize("given", [1010, -3.0, float("nan"), torch.tensor([5.0, 2000.0])])
def test_noise_levels_outside_the_range_are_refused(given):
    with pytest.raises(BadArgument, match="outside this model's range of 0 to 1000"):
        noise_level(ModelFacts(("blocks",)), {}, given)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: declare("Block", BlockFacts()), "a class of modules first"),
        (lambda: declare(nn.Linear, {"state": 0}), "takes BlockFacts"),
        (lambda: BlockFacts(text=1), "say the place of the state too"),
        (lambda: BlockFacts(state=1, text=1), "cannot both be at place 1"),
    ],
)
def test_bad_declarations(make, match):
    with pytest.raises(BadArgument, match=match):
        make()
