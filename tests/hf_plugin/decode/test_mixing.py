"""Heads that read earlier states: their keys and values are those of the text, also after rejections and trees."""

import pytest
import torch

import offramp
from offramp.head import Around
from offramp_hf.decode import intercept
from offramp_hf.decode.answers import Answers

NEW = 24


@pytest.fixture
def drivers(monkeypatch):
    """The drivers of all calls, as they stand at the end."""
    made, kind = [], intercept.Verified

    def build(*args):
        made.append(kind(*args))
        return made[-1]

    monkeypatch.setattr(intercept, "Verified", build)
    return made


def shaken(exits):
    for depth in exits:
        torch.nn.init.normal_(exits[depth].out.weight, std=0.1)
    return exits


@pytest.mark.parametrize("rows", ["one", "three"])
@pytest.mark.parametrize("rule", ["confident", "fixed", "tree", "dssd"])
def test_memory_is_that_of_the_text(model, request, drivers, rows, rule):
    batch = request.getfixturevalue(rows)
    wanted = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    exits = shaken(offramp.attach(model, at=[2, 4], head="adapter"))
    with offramp.enable(model, "fixed", depth=2, verify=True, draft=rule) as run:
        assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False), wanted)
        assert 0 < run.stats.accepted < run.stats.drafted
    driver = drivers[-1]
    memory, head = driver.memories[0], exits[2]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(len(mask), NEW)], 1)
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), exits.backbone.chain().capture([2]) as kept:
        model(input_ids=wanted, attention_mask=mask, position_ids=where)
        keys = head.qkv(head.mix_norm(kept[2])).unflatten(-1, (3, head.heads, -1))[:, :, 1].transpose(1, 2)
        keys = head.turn(torch.stack([keys, keys]), where)[0]
    held, length = memory.layer.keys, memory.layer.length
    kept = torch.ones(len(wanted), length) if driver.place.mask is None else driver.place.mask[:, :length]
    for row in range(len(wanted)):
        found, real = held[row][:, kept[row].bool()], keys[row][:, mask[row].bool()]
        # what came last may not have been read yet, and rows that ended hold what nobody reads
        count = wanted.shape[1] - 6 - int((mask[row] == 0).sum())
        torch.testing.assert_close(found[:, :count], real[:, :count], rtol=1e-4, atol=1e-5)


def test_all_accepted_feeds_two_states(model, one, monkeypatch):
    """When every draft is right, the head has not read the last one; the next round reads it and the new token."""
    offramp.attach(model, at=[5], head="adapter")
    for block in model.model.layers[5:]:  # the deep part changes nothing: every draft is the full model's
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    wanted = model.generate(**one, max_new_tokens=NEW, do_sample=False)
    read, mix = [], Answers.mix
    monkeypatch.setattr(
        Answers, "mix", lambda self, level, new, *rest: (read.append(new.shape[1]), mix(self, level, new, *rest))[1]
    )
    with offramp.enable(model, "fixed", depth=5, verify=True, draft={"rule": "fixed", "length": 3}) as run:
        assert torch.equal(model.generate(**one, max_new_tokens=NEW, do_sample=False), wanted)
        assert run.stats.accepted == run.stats.drafted > 0
    prompt = one["input_ids"].shape[1]
    assert read[0] == prompt + 1 and set(read[1:]) == {1, 2}
    assert read[1:4] == [1, 1, 2]


def test_mixing_piece_by_piece_is_mixing_at_once(model):
    from offramp_hf.cache import GrowingLayer

    exits = shaken(offramp.attach(model, at=[2], head="adapter"))
    hidden = torch.randn(2, 9, 32)
    whole = exits[2].mix(hidden, Around(torch.arange(9)[None]))
    past, parts = GrowingLayer(), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        parts.append(exits[2].mix(hidden[:, start:stop], Around(torch.arange(start, stop)[None], None, past)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["adapter", "layer"])
def test_fit_raises_agreement_and_files_keep_it(model, head, tmp_path):
    ids = torch.randint(3, 97, (40, 16), generator=torch.Generator().manual_seed(3))
    exits = offramp.attach(model, at=[2, 4], head=head)
    report = offramp.fit(model, ids, steps=60, lr=5e-3, progress=False)
    assert report.agreement[2] > report.before[2]
    trace = offramp.record(model, ids)
    exits.save(tmp_path)
    exits.detach()
    offramp.load(model, tmp_path)
    again = offramp.record(model, ids)
    assert torch.equal(again.label, trace.label) and again.model_hash == trace.model_hash


def test_early_blocks_never_run_again(model, one):
    """Drafting and verifying run every block once per token that is drafted or kept, never the early ones twice."""
    counts = [0] * 6

    def counter(index):
        def count(module, args, output):
            counts[index] += (output[0] if isinstance(output, tuple) else output).shape[1]

        return count

    exits = offramp.attach(model, at=[2], head="tied")
    with offramp.enable(model, "fixed", depth=2, verify=True, draft={"rule": "fixed", "length": 3}) as run:
        model.generate(**one, max_new_tokens=NEW, do_sample=False)  # with the probes that run once
        run.stats.reset()
        handles = [b.self_attn.register_forward_hook(counter(i)) for i, b in enumerate(exits.backbone.blocks)]
        model.generate(**one, max_new_tokens=NEW, do_sample=False)
        for handle in handles:
            handle.remove()
    prompt, stats = one["input_ids"].shape[1], run.stats
    seen = prompt + stats.drafted + (stats.rounds - 1)  # each round looks at its newest token and its drafts
    assert counts == [seen] * 6
