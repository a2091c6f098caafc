"""SkipDecode: whose blocks run is known in advance, what they compute is checked against blocks called by hand."""

import copy

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, LogitsProcessorList

import offramp
from offramp.errors import BadArgument, NotAttached
from offramp.live import Live
from offramp.policy import SchedulePolicy

NEW = 12
OPTIONS = {"max_depth": 6, "min_depth": 2, "length": 9}


def greedy(model, batch, new=NEW, **kwargs):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **kwargs)


def enable(model, **options):
    return offramp.enable(model, "position_schedule", kv="schedule", **{**OPTIONS, **options})


def by_hand(model, ids, policy, new=NEW):
    """Return the greedy text of one row, each block called by hand on the tokens that it is given."""
    base, cache, position, state = model.model, DynamicCache(), 0, None
    ids, out = ids.clone(), []
    with torch.no_grad():
        for t in range(new):
            tokens = ids if t == 0 else ids[:, -1:]
            where = torch.arange(position, position + tokens.shape[1])[None]
            state = base.embed_tokens(tokens)
            mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)[None, None] if t == 0 else None
            blocks = range(6) if t == 0 else [i for a, b in policy.windows(t, 6) for i in range(a, b)]
            for i in blocks:
                state = base.layers[i](
                    state, attention_mask=mask, position_ids=where, past_key_values=cache, use_cache=True,
                    position_embeddings=base.rotary_emb(state, where),
                )  # fmt: skip
            out.append(model.lm_head(base.norm(state[:, -1])))
            ids = torch.cat([ids, out[-1].argmax(-1)[None]], 1)
            position += tokens.shape[1]
    return ids, torch.cat(out)


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_one_row_by_hand(model, one, warmup):
    run = enable(model, warmup=warmup)
    wanted, _ = by_hand(model, one["input_ids"], run.policy)
    assert torch.equal(greedy(model, one), wanted)
    run.disable()
    assert not torch.equal(greedy(model, one), wanted)


def test_padded_rows_are_each_what_they_are_alone(make, three):
    model = make(scale=1.0)
    with enable(model) as run:
        together = greedy(model, three)
        for row in range(3):
            keep = three["attention_mask"][row].bool()
            wanted, _ = by_hand(model, three["input_ids"][row : row + 1, keep], run.policy)
            assert together[row, 11:].tolist() == wanted[0, keep.sum() :].tolist()


@pytest.mark.parametrize("rows", ["one", "three"])
def test_blocks_run_are_block_calls_and_the_closed_form(model, request, rows):
    batch, calls = request.getfixturevalue(rows), []
    count = len(batch["input_ids"])
    with enable(model, length=NEW) as run:
        greedy(model, batch)  # the first call probes
        run.stats.reset()
        for block in model.model.layers:
            block.mlp.register_forward_hook(lambda m, args, out: calls.append(out.shape[:2]))
        greedy(model, batch)
    stats, wanted = run.stats, [6, *(round(6 - 4 * t / (NEW - 1)) for t in range(1, NEW))]
    assert stats.blocks_run == sum(n for n, _ in calls) == count * sum(wanted)
    assert [length for _, length in calls[6:]] == [1] * (len(calls) - 6)  # no token runs a block twice
    assert stats.last_depths.tolist() == wanted * count
    assert stats.depth_mean == pytest.approx((6 + 2) / 2) and stats.saved == pytest.approx(1 - (6 + 2) / 2 / 6)
    assert stats.tokens == count * NEW and stats.rounds == NEW


def test_a_long_text(model, one):
    """Past the schedule's end, and past the end of a table of positions."""
    with enable(model) as run:
        wanted, _ = by_hand(model, one["input_ids"], run.policy, 300)
        assert torch.equal(greedy(model, one, 300), wanted)
        assert run.stats.last_depths[8:].tolist() == [2] * 292


def test_a_flat_schedule_is_a_smaller_model(model, one):
    """All of the depth is the model itself; the same text as without."""
    wanted = greedy(model, one)
    with enable(model, max_depth=6, min_depth=6) as run:
        assert torch.equal(greedy(model, one), wanted)
        assert run.stats.saved == 0 and run.stats.exits == {6: NEW}


class Words:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces += value.reshape(-1).tolist()

    def end(self):
        self.ended = True


class Forbid:
    """A logits processor that forbids what was said three tokens ago and keeps what it is shown."""

    def __init__(self):
        self.lengths = []

    def __call__(self, ids, scores):
        self.lengths.append(ids.shape[1])
        return scores.scatter(1, ids[:, -3:-2], -torch.inf)


def test_processors_streamers_ends_and_sampling(model, one, three):
    with enable(model):
        plain, forbid, words = greedy(model, one), Forbid(), Words()
        text = greedy(model, one, logits_processor=LogitsProcessorList([forbid]), streamer=words)
        assert forbid.lengths == list(range(9, 9 + NEW)) and words.ended and words.pieces == text[0].tolist()
        assert all(text[0, i] != text[0, i - 3] for i in range(9, 9 + NEW))
        end = int(plain[0, 13])
        stopped = greedy(model, one, eos_token_id=end)[0].tolist()
        assert stopped == plain[0].tolist()[: plain[0].tolist().index(end, 9) + 1]
        torch.manual_seed(0)
        first = model.generate(**three, max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
        torch.manual_seed(0)
        again = model.generate(**three, max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
        assert first.shape == (6, 11 + NEW) and torch.equal(first, again)


def test_sampling_has_the_distribution_of_the_scheduled_model(make):
    model = make(vocab=11, scale=1.0)
    ids = torch.arange(3, 8)[None]
    with enable(model, length=2) as run:
        greedy_ids, logits = by_hand(model, ids, run.policy, 2)
        batch = {"input_ids": greedy_ids[:, :5].expand(3000, -1)}
        torch.manual_seed(0)
        made = model.generate(**batch, max_new_tokens=2, do_sample=True, top_k=0)
    after = made[made[:, 5] == greedy_ids[0, 5], 6]
    found = torch.bincount(after, minlength=11) / len(after)
    assert len(after) > 300 and float((found - logits[1].softmax(-1)).abs().sum()) < 0.2


def test_stop_strings(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    model = hf.AutoModelForCausalLM.from_pretrained("tests/assets/pycode-5m").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained("tests/assets/pycode-5m")
    batch = dict(tokenizer("def add(a, b):\n    ", return_tensors="pt"))
    batch.pop("token_type_ids", None)
    with offramp.enable(model, "position_schedule", max_depth=12, min_depth=9, length=24, kv="schedule"):
        whole = tokenizer.decode(greedy(model, batch, 30)[0])
        string = whole[len("def add(a, b):\n    ") :].strip()[3:5]
        text = tokenizer.decode(greedy(model, batch, 30, stop_strings=[string], tokenizer=tokenizer)[0])
    assert whole.startswith(text) and string in text and len(text) < len(whole)


def test_without_exits_and_back(model, one, marks):
    before, clean = greedy(model, one), marks(model)
    run = enable(model)
    early = greedy(model, one)
    assert marks(copy.deepcopy(model)).keys() == marks(model).keys()
    run.disable()
    assert marks(model) == clean and torch.equal(greedy(model, one), before)
    with offramp.attach(model, at=[2, 4]), enable(model):  # exits change nothing
        assert torch.equal(greedy(model, one), early)


def test_the_flag_of_the_config(model, one):
    with enable(model):
        wanted = greedy(model, one)
    model.config.early_exit = {"policy": "position_schedule", "kv": "schedule", **OPTIONS}
    with offramp.enable(model):
        assert torch.equal(greedy(model, one), wanted)
        config = hf.GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        config.early_exit = {"policy": "confidence", "threshold": 0.5}
        with pytest.raises(NotAttached, match=r"confidence decides at exits.*offramp.attach"):
            model.generate(**one, generation_config=config)


@pytest.mark.parametrize("options", [{}, {"kv": "propagate"}, {"kv": "schedule", "verify": True}])
def test_a_schedule_needs_its_kv(model, marks, options):
    clean = marks(model)
    with pytest.raises(BadArgument, match='position_schedule .*needs kv="schedule" and no verify'):
        offramp.enable(model, "position_schedule", **OPTIONS, **options)
    assert marks(model) == clean


def test_other_policies_cannot_have_it(model):
    offramp.attach(model, at=[2])
    with pytest.raises(BadArgument, match=r'kv="schedule" is for .*position_schedule.*confidence decides'):
        offramp.enable(model, "confidence", threshold=0.5, kv="schedule")
    with pytest.raises(BadArgument, match="max_depth=7 is more than the 6 blocks"):
        enable(model, max_depth=7)


def test_a_cache_to_keep_is_refused_with_the_reason(model, one):
    wanted = greedy(model, one)
    with enable(model) as run:
        with pytest.warns(UserWarning, match="a cache to keep .* the full model generates"):
            out = greedy(model, one, return_dict_in_generate=True)
        assert torch.equal(out.sequences, wanted) and run.stats.tokens == 0
        assert torch.equal(greedy(model, one, past_key_values=DynamicCache(config=model.config)), wanted)
    with enable(model, strict=True), pytest.raises(offramp.OfframpError, match="a cache to keep"):
        greedy(model, one, return_dict_in_generate=True)


class ComesBack(SchedulePolicy):
    def windows(self, position, depth):
        return ((0, depth),) if position % 3 == 0 else ((0, 2),)

    def step(self, state, seen):
        return seen.every(False), state


def test_a_block_that_comes_back_is_an_error(model, one):
    wanted = greedy(model, one)
    with offramp.enable(model, ComesBack(), kv="schedule"):
        with pytest.raises(BadArgument, match="token 3 runs block 2, which holds keys and values of 9 of 11 tokens"):
            greedy(model, one)
    assert torch.equal(greedy(model, one), wanted)


@pytest.mark.parametrize("prompt", [1, 4])
def test_training_sees_the_logits_of_decoding(make, prompt):
    """The places of a whole text say in one forward what decoding says token by token."""
    model = make(scale=1.0)
    policy = offramp.policy("position_schedule", **OPTIONS)
    ids, wanted = by_hand(model, torch.arange(5, 5 + prompt)[None], policy)
    labels = ids.clone()
    labels[:, :prompt] = -100
    data = {"input_ids": ids, "labels": labels}
    exits = offramp.attach(model, at=[3])
    with torch.no_grad():
        seen = Live(exits, data, 1, 0, 0.0, policy).observe(data)
    found = exits.backbone.context().readout(seen.final)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert seen.targets.tolist() == ids[0, prompt:].tolist()
    with offramp.enable(model, policy, kv="schedule"):
        assert torch.equal(greedy(model, {"input_ids": ids[:, :prompt]}), ids)


def test_training_with_the_schedule_makes_it_better(model, three):
    """A model without exits learns one text under its schedule; its own call is the same before and after."""
    policy = offramp.policy("position_schedule", **OPTIONS)
    ids = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(3))
    labels = ids.masked_fill(torch.arange(16) < 4, -100)
    grads = [p.requires_grad for p in model.parameters()]
    report = offramp.fit(
        model, {"input_ids": ids, "labels": labels}, backbone=True, schedule=policy, steps=60, lr=5e-3, progress=False
    )
    assert report.losses[-1] < 0.3 * report.losses[0] and [p.requires_grad for p in model.parameters()] == grads
    with enable(model):
        made = greedy(model, {"input_ids": ids[:, :4]})
    assert float((made == ids).double().mean()) > 0.9 and "forward" not in model.model.layers[3].__dict__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": offramp.policy("never"), "backbone": True}, "fixes the blocks of every position"),
        ({"schedule": offramp.policy("position_schedule", **OPTIONS)}, "needs backbone=True"),
        (
            {"schedule": offramp.policy("position_schedule", max_depth=7, min_depth=2, length=4), "backbone": True},
            "more than the 6 blocks",
        ),
        (
            {"schedule": offramp.policy("position_schedule", **OPTIONS), "backbone": True, "loss": "labels"},
            "trains exits, and there are none",
        ),
        ({"schedule": offramp.policy("position_schedule", **OPTIONS), "backbone": True}, "needs labels"),
    ],
)
def test_what_cannot_be_trained(model, one, options, message):
    data = {**one, "labels": one["input_ids"]} if "loss" in options else one
    with pytest.raises(BadArgument, match=message):
        offramp.fit(model, data, steps=1, progress=False, **options)


def gpt2():
    """Learned positions, tuples out of the blocks."""
    config = hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4, n_positions=64, initializer_range=0.2)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": None, "pad_token_id": 0})
    return hf.GPT2LMHeadModel(config).eval()


def t5():
    """An encoder beside it, and a relative bias that the first block makes for all."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 6, "num_heads": 4}
    config = hf.T5Config(vocab_size=97, dropout_rate=0.0, initializer_factor=3.0, decoder_start_token_id=0, **sizes)
    config.update({"eos_token_id": None, "pad_token_id": 0})
    return hf.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("build", [gpt2, t5])
def test_other_models_decode_what_one_masked_forward_says(three, build):
    model = build()
    model.generation_config.eos_token_id = None
    with enable(model) as run:
        made = greedy(model, three)
        policy, backbone = run.policy, run.backbone
        assert run.stats.saved > 0.2
    if build is t5:
        data = {**three, "decoder_input_ids": made[:, :-1], "labels": made[:, 1:]}
    else:
        mask = torch.cat([three["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], 1)
        labels = made.masked_fill(torch.arange(11 + NEW) < 11, -100)
        where = (mask.cumsum(-1) - 1).clamp(min=0)
        data = {"input_ids": made, "attention_mask": mask, "labels": labels, "position_ids": where}
    exits = offramp.attach(model, at=[3])
    with torch.no_grad():
        seen = Live(exits, data, 3, 0, 0.0, policy).observe(data)
        assert torch.equal(backbone.context().readout(seen.final).argmax(-1), seen.targets)
    assert seen.targets.tolist() == made[:, -NEW:].flatten().tolist()
