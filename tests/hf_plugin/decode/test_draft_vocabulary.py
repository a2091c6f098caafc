"""Drafts from a part of the vocabulary: the same text, whatever is left out; narrow heads read fewer rows."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument

PLAIN = ("tied", "translator", "mlp", "lora", "linear")
MIXING = ("adapter", "layer")
SOME = list(range(40, 90))


def text(model, batch, **kwargs):
    return model.generate(**batch, max_new_tokens=24, **{"do_sample": False, **kwargs})


@pytest.mark.parametrize("head", [*PLAIN, *MIXING])
def test_identical_tokens(model, one, three, head):
    wanted, wanted3 = text(model, one), text(model, three)
    offramp.attach(model, [2, 4], head)
    for rule in ("adaptive", "tree", {"rule": "fixed", "length": 4}, *(["del"] if head in PLAIN else [])):
        policy = offramp.policy("confidence", threshold=0.02)
        with offramp.enable(model, policy, verify=True, draft=rule, draft_vocabulary=SOME) as run:
            assert torch.equal(text(model, one), wanted)
            assert torch.equal(text(model, three), wanted3)
            assert run.stats.drafted and run.stats.accepted


def test_drafts_are_of_the_vocabulary(model, one):
    """Left out is never drafted: of tokens that the model never says, no draft is right."""
    said = set(text(model, one)[0, one["input_ids"].shape[1] :].tolist())
    never = [i for i in range(97) if i not in said]
    offramp.attach(model, [2])
    rates = {}
    for name, ids in (("all", range(97)), ("said", sorted(said)), ("never", never)):
        with offramp.enable(model, "fixed", depth=2, verify=True, draft=4, draft_vocabulary=ids) as run:
            text(model, one)
            rates[name] = run.stats.accepted / run.stats.drafted
    assert rates["never"] == 0 < rates["all"] <= rates["said"]


def test_all_of_it_in_another_order_drafts_the_same(model, one):
    offramp.attach(model, [2])
    drafted = []
    for ids in (None, 97, torch.randperm(97, generator=torch.Generator().manual_seed(0))):
        with offramp.enable(model, "confidence", threshold=0.06, verify=True, draft=4, draft_vocabulary=ids) as run:
            text(model, one, num_beams=1)
            drafted.append((run.stats.drafted, run.stats.accepted))
    assert len(set(drafted)) == 1


def test_rows_follow_the_weights(model, one):
    """Training between two calls counts: the rows are copied anew."""
    offramp.attach(model, [2], "linear")
    with offramp.enable(model, "fixed", depth=2, verify=True, draft=4, draft_vocabulary=SOME) as run:
        text(model, one)
        first = run.stats.accepted
        with torch.no_grad():
            model.exits["2"].proj.weight.neg_()
        run.stats.reset()
        text(model, one)
    assert run.stats.accepted < first


def test_in_the_config_flag(model, one):
    wanted = text(model, one)
    offramp.attach(model, [2])
    model.config.early_exit = {"policy": "fixed", "depth": 2, "verify": True, "draft_vocabulary": SOME}
    with offramp.enable(model) as run:
        assert torch.equal(text(model, one), wanted)
    assert run.stats.drafted


@pytest.mark.parametrize("given", [0, -1, True, 1.5, [], [3, 3], [-1], ["a"]])
def test_no_vocabulary(model, given):
    offramp.attach(model, [2])
    with pytest.raises(BadArgument, match=r"topk\(8192\)"):
        offramp.enable(model, "fixed", depth=2, verify=True, draft_vocabulary=given)


def test_refused(model):
    exits = offramp.attach(model, [2], "speculative")
    torch.nn.init.normal_(exits[2].exit_gate[-1].weight)
    with pytest.raises(BadArgument, match="verify=True"):
        offramp.enable(model, "fixed", depth=2, draft_vocabulary=9)
    with pytest.raises(BadArgument, match="token 97, and the model has 97"):
        offramp.enable(model, "fixed", depth=2, verify=True, draft_vocabulary=98)
    with pytest.raises(BadArgument, match="gate asks about"):
        offramp.enable(model, "speculative_gate", verify=True, draft_vocabulary=9)
    assert "generate" not in model.__dict__
