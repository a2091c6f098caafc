"""Taking back early tokens that surprise the deep blocks: what stays was checked, the rest is as if it never was."""

import pytest
import torch
from transformers import DynamicCache, TextStreamer

import offramp
from offramp.errors import BadArgument

NEW = 30


def greedy(model, batch, new=NEW, **kwargs):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **kwargs)


@pytest.fixture
def padded():
    ids = torch.arange(5, 14)[None]
    return {"input_ids": torch.cat([ids[:, :2] * 0, ids], 1), "attention_mask": torch.tensor([[0, 0] + [1] * 9])}


def surprises(model, batch, ids):
    """-log p of each new token under the full model, and whether it is its choice."""
    prompt = batch["input_ids"].shape[1]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(1, ids.shape[1] - prompt)], 1)
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=where).logits[0, prompt - 1 : -1]
    new = ids[0, prompt:, None]
    return -logits.log_softmax(-1).gather(-1, new)[:, 0], logits.argmax(-1) == new[:, 0]


@pytest.mark.parametrize("rows", ["one", "padded"])
@pytest.mark.parametrize(("at", "threshold"), [([2], 0.06), ([1, 3], 0.1)])
@pytest.mark.parametrize("limit", [1.5, 2.0, 1e9])
def test_what_the_deep_blocks_have_seen_is_below_the_limit(model, request, rows, at, threshold, limit):
    batch = request.getfixturevalue(rows)
    offramp.attach(model, at=at)
    with offramp.enable(model, "confidence", threshold=threshold, rollback=limit) as run:
        ids = greedy(model, batch)
        depths = run.stats.last_depths
    found, best = surprises(model, batch, ids)
    deep = (depths == 6).nonzero()[:, 0]
    assert len(depths) == ids.shape[1] - batch["input_ids"].shape[1] == NEW and best[deep].all()
    early = found[: int(deep[-1])][depths[: int(deep[-1])] < 6]
    assert (early <= limit).all()
    with offramp.enable(model, "confidence", threshold=threshold):
        plain = greedy(model, batch)
        if limit > 100:
            assert torch.equal(plain, ids)
        else:
            assert not torch.equal(plain, ids)


@torch.no_grad()
def test_heads_that_read_earlier_states_forget_those_taken_back(model, one):
    exits = offramp.attach(model, at=[2], head="layer")
    for name, weight in exits[2].named_parameters():
        if "o_proj" in name:  # what earlier states say has to count
            weight.mul_(30)
    with offramp.enable(model, "confidence", threshold=0.06) as run:
        plain = greedy(model, one)
    with offramp.enable(model, "confidence", threshold=0.06, rollback=1.5) as run:
        ids, depths = greedy(model, one), run.stats.last_depths.tolist()
    assert not torch.equal(plain, ids) and depths.count(2) > 5
    said = exits[2](exits.inputs(exits.observe({"input_ids": ids}))[0]).argmax(-1)
    for i, depth in enumerate(depths):
        assert depth == 6 or said[8 + i] == ids[0, 9 + i], i


@pytest.mark.parametrize("rows", ["one", "padded"])
def test_with_no_surprise_allowed_it_is_the_full_model_up_to_what_still_waits(model, request, rows):
    batch = request.getfixturevalue(rows)
    wanted = greedy(model, batch)
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.06, rollback=1e-9) as run:
        ids = greedy(model, batch)
        last = int((run.stats.last_depths == 6).nonzero().max())
    prompt = batch["input_ids"].shape[1]
    assert last > 10 and torch.equal(ids[:, : prompt + last + 1], wanted[:, : prompt + last + 1])


def test_scores_and_cache_are_those_of_the_text_that_stays(model, one):
    exits = offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.06, rollback=3.0):
        plain = greedy(model, one)
        cache = DynamicCache(config=model.config)
        out = greedy(
            model, one, past_key_values=cache, return_dict_in_generate=True, output_scores=True, output_logits=True
        )
    assert torch.equal(out.sequences, plain) and len(out.scores) == len(out.logits) == NEW
    assert [int(s.argmax()) for s in out.scores] == plain[0, 9:].tolist()
    exits.detach()
    with torch.no_grad():
        wanted = model(input_ids=plain[:, :-1]).past_key_values
    for mine, theirs in zip(cache.layers, wanted.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)


def test_it_learns_and_takes_back_at_once(model, one):
    offramp.attach(model, at=[2])
    with offramp.enable(model, "beta_mixture", threshold=0.06, on="top1", rollback=3.0) as run:
        greedy(model, one)
        assert float(run.memory["learned"][1]["threshold"]) >= 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollback": 0.0}, "rollback=0.0 must be a number of nats above 0"),
        ({"rollback": float("inf")}, "or None to keep every token"),
        ({"rollback": True}, "rollback=True must be"),
        ({"rollback": 1.0, "verify": True}, "verify=True"),
        ({"rollback": 1.0, "kv": "propagate"}, "kv='propagate'"),
    ],
)
def test_what_means_nothing_is_refused(model, marks, options, message):
    offramp.attach(model, at=[2])
    before = marks(model)
    with pytest.raises(BadArgument, match=message):
        offramp.enable(model, "confidence", threshold=0.5, **options)
    assert marks(model) == before


def test_several_rows_and_streamers_are_refused(model, one, three):
    class Words:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.06, rollback=3.0) as run:
        with pytest.raises(BadArgument, match=r"different lengths \(this batch has 3\)"):
            greedy(model, three)
        with pytest.raises(BadArgument, match="streamed cannot be taken back"):
            greedy(model, one, streamer=TextStreamer(Words()))
        assert greedy(model, one).shape == (1, 9 + NEW) and run.enabled
