"""Gates while generating: against a step by hand, batches, what runs, and a real model."""

from pathlib import Path

import pytest
import torch

import offramp
from offramp.kernels.subset_logits import among
from offramp.speculative import busiest

ASSETS = Path(__file__).parents[2] / "assets"
AT, NEW = (1, 2, 3, 4, 5), 16


def greedy(model, batch, new=NEW, **kwargs):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **kwargs)


@pytest.fixture
def exits(model):
    """Gates that fire for about half of the tokens each, as if trained."""
    exits = offramp.attach(model, AT, head="speculative", candidates=3, hidden=16)
    for depth in exits:
        torch.nn.init.normal_(exits[depth].exit_gate[-1].weight)
    trace = offramp.record(model, torch.randint(3, 97, (8, 24)))
    for depth, gates in zip(exits, trace.stats["gate"].unbind(1), strict=False):
        fired = gates[gates > 0]
        with torch.no_grad():
            exits[depth].exit_gate[-1].bias.sub_(fired.logit().median())
    return exits


@torch.no_grad()
def by_hand(exits, ids, threshold, layers=AT):
    """Exit depth and next token after `ids`, from the states of the whole text: exact where all keys are exact."""
    states = exits.backbone.observe(ids, [*AT]).hidden
    carried = exits[AT[0]].draft(states[0][-1:])
    p = carried["p"]
    for depth, state in zip(AT, states, strict=True):
        if depth not in layers:
            continue
        logit, p = exits[depth].gate(state[-1:], carried["candidates"], p)
        answer = exits[depth](state[-1:])
        if logit.sigmoid() > threshold and among(answer, carried["candidates"]):
            return depth, int(answer.argmax())
    return 6, int(exits.model(ids).logits[0, -1].argmax())


@pytest.mark.parametrize("layers", [None, [2, 4]])
def test_every_token_by_hand(model, exits, one, layers):
    options = {} if layers is None else {"layers": layers}
    with offramp.enable(model, "speculative_gate", threshold=0.5, **options) as run:
        out = greedy(model, one)
    depths = run.stats.last_depths.tolist()
    assert len(set(depths)) > 2 and depths[0] == 6
    for i in range(1, NEW):
        assert by_hand(exits, out[:, : 9 + i], 0.5, layers or AT) == (depths[i], int(out[0, 9 + i]))


@pytest.mark.parametrize("kv", ["catch_up", "propagate"])
@pytest.mark.parametrize("options", [{}, {"layers": [3], "online": True, "reach": 1, "recent": 2}])
def test_padded_rows_decide_as_each_alone(model, exits, three, kv, options):
    with offramp.enable(model, "speculative_gate", threshold=0.5, kv=kv, **options) as run:
        together = greedy(model, three)
        depths = run.stats.last_depths.view(3, NEW).tolist()
        for row in range(3):
            keep = three["attention_mask"][row].bool()
            alone = greedy(model, {"input_ids": three["input_ids"][row : row + 1, keep]})
            assert together[row, 11:].tolist() == alone[0, keep.sum() :].tolist()
            assert run.stats.last_depths.tolist() == depths[row]
    assert len({d for row in depths for d in row}) > 2


def test_blocks_gates_and_heads_that_run(model, exits, one):
    """Blocks run as counted; the whole head runs once per token to draft, and then only where a gate has fired."""
    with offramp.enable(model, "speculative_gate"):
        greedy(model, one)  # the first call probes how blocks can be run
    blocks, heads, fired = [0], [0], [0]
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda m, args, out: blocks.__setitem__(0, blocks[0] + 1))
    for depth in AT:
        exits[depth].register_forward_hook(lambda m, args, out: heads.__setitem__(0, heads[0] + 1))

        def gate(*args, plain=exits[depth].gate, depth=depth):
            logit, p = plain(*args)
            fired[0] += bool(logit > 0) and depth > AT[0]  # the first exit's answer is there already
            return logit, p

        exits[depth].__dict__["gate"] = gate
    with offramp.enable(model, "speculative_gate", threshold=0.5) as run:
        greedy(model, one)
    assert blocks[0] == run.stats.blocks_run < run.stats.blocks_full
    assert heads[0] == NEW - 1 + fired[0] and fired[0] > 0


def test_gates_can_draft_losslessly(model, exits, one):
    plain = greedy(model, one)
    with offramp.enable(model, "speculative_gate", threshold=0.4, verify=True, draft=3) as run:
        assert torch.equal(greedy(model, one), plain)
    assert run.stats.drafted > 0


def test_online_follows_what_this_text_did(model, exits, one):
    """Exits outside the offline set are only asked near recent ones, and the history starts anew with each call."""
    options = {"layers": [1], "online": True, "recent": 1, "reach": 0}
    with offramp.enable(model, "speculative_gate", threshold=0.5, **options) as run:
        first = greedy(model, one)
        depths = run.stats.last_depths.tolist()
        assert torch.equal(greedy(model, one), first) and run.stats.last_depths.tolist() == depths
    assert set(depths) <= {1, 6}  # the full model's depth is no exit, so nothing is near it
    wider = {**options, "reach": 1}
    with offramp.enable(model, "speculative_gate", threshold=0.5, **wider) as run:
        greedy(model, one)
    depths = run.stats.last_depths.tolist()
    assert all(d in (1, 6) or abs(d - before) <= 1 for before, d in zip(depths[:-1], depths[1:], strict=True))
    assert set(depths) - {1, 6}


def test_a_gate_that_is_nan_stops_nothing(model, exits, one):
    plain = greedy(model, one)
    with torch.no_grad():
        for depth in AT:
            exits[depth].exit_gate[-1].bias.fill_(float("nan"))
    with offramp.enable(model, "speculative_gate", threshold=0.0) as run:
        assert torch.equal(greedy(model, one), plain)
    assert run.stats.exits == {6: NEW} and run.stats.saved == 0


def test_enabling_for_one_call_needs_gates_too(model, one):
    offramp.attach(model, AT)
    config = model.generation_config.__class__(max_new_tokens=4, do_sample=False)
    config.early_exit = {"policy": "speculative_gate"}
    with offramp.enable(model, "confidence", threshold=0.5):
        with pytest.raises(offramp.OfframpError, match="have no gates to ask"):
            model.generate(**one, generation_config=config)


@pytest.mark.slow
def test_one_fit_call_on_a_real_model():
    """Where a trained gate fires, its exit is wrong less often than it is on average."""
    from offramp_hf.prepare import ids_of, load

    model, tokenizer = load(ASSETS / "pycode-5m-layerskip")
    text = (ASSETS / "pycode-5m" / "heldout.txt").read_text(encoding="utf-8")
    ids = ids_of(tokenizer, text)[: 128 * 60].view(60, 128)
    offramp.attach(model, at=range(2, 12), head="speculative", candidates=4)
    report = offramp.fit(model, ids[:40], loss="speculative_gate", steps=60, rows=256, progress=False)
    assert sum(report.losses[-5:]) / 5 < 0.6 < 0.69 < report.losses[0]
    trace = offramp.record(model, ids[40:])
    right = trace.label == trace.label[:, -1:]
    for column in range(len(trace.depths) - 1):
        fired = trace.stats["gate"][:, column] > 0.7
        if fired.sum() >= 50:
            wrong, before = 1 - right[fired, column].float().mean(), 1 - right[:, column].float().mean()
            assert wrong < 0.8 * before
    found = [offramp.simulate(trace, "speculative_gate", threshold=t) for t in (0.5, 0.7, 0.9)]
    assert found[0].agreement < found[1].agreement < found[2].agreement
    assert found[0].saved > found[1].saved > found[2].saved > 0 and found[2].agreement > 0.9
    fixed = offramp.simulate(trace, "fixed", depth=round(found[1].depth_mean))
    assert found[1].agreement > fixed.agreement + 0.05  # per token pays against the same depth for all
    layers = busiest(trace, offramp.policy("speculative_gate"), 4)
    for options in ({}, {"layers": layers}, {"layers": layers, "online": True}):
        with offramp.enable(model, "speculative_gate", threshold=0.7, **options) as run:
            greedy(model, {"input_ids": ids[50:51, :32]}, new=24, eos_token_id=None)
        assert run.stats.saved > 0 and run.stats.tokens == 24
