"""Lossy decoding: what is propagated, against a Llama written by hand; what waits, and what is left in the cache."""

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import offramp

NEW = 16


def greedy(model, batch, new=NEW, **kwargs):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **kwargs)


class ByHand:
    """A Llama with keys and values in lists; an exit state goes through each deeper block's projections."""

    def __init__(self, model):
        self.model, self.base = model, model.model
        self.keys = [[] for _ in self.base.layers]
        self.values = [[] for _ in self.base.layers]

    def store(self, index, state, position):
        block = self.base.layers[index]
        x = block.input_layernorm(state)
        a = block.self_attn
        q, k, v = (p(x).view(1, -1, a.head_dim).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        cos, sin = self.base.rotary_emb(x, torch.tensor([[position]]))
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        self.keys[index].append(k[0])
        self.values[index].append(v)
        return q[0]

    def block(self, index, state, position):
        block = self.base.layers[index]
        q = self.store(index, state, position)
        groups = q.shape[0] // self.keys[index][0].shape[0]
        keys, values = (torch.cat(t[index], 1).repeat_interleave(groups, 0) for t in (self.keys, self.values))
        weights = (q @ keys.transpose(-1, -2) * block.self_attn.head_dim**-0.5).softmax(-1)
        state = state + block.self_attn.o_proj((weights @ values).transpose(0, 1).reshape(1, -1))
        return state + block.mlp(block.post_attention_layernorm(state))

    def token(self, token, position, threshold):
        """Return (next token, depth) with the exits asked on the way; threshold None: the full model."""
        state = self.base.embed_tokens(torch.tensor([token]))
        for i in range(len(self.base.layers)):
            state = self.block(i, state, position)
            if threshold is not None and str(i + 1) in self.model.exits:
                answer = self.model.exits[str(i + 1)](state)[0]
                if answer.softmax(-1).max() >= threshold:
                    for deeper in range(i + 1, len(self.base.layers)):
                        self.store(deeper, state, position)
                    return int(answer.argmax()), i + 1
        return int(self.model.lm_head(self.base.norm(state))[0].argmax()), len(self.base.layers)


@pytest.mark.parametrize("threshold", [0.0, 0.06, 0.08, 1.0])
def test_propagate_by_hand(model, one, threshold):
    offramp.attach(model, at=[2, 4])
    hand, made, depths = ByHand(model), [], []
    with torch.no_grad():
        for position, token in enumerate(one["input_ids"][0].tolist()):
            new, depth = hand.token(token, position, None)
        for position in range(9, 9 + NEW):
            made.append(new)
            depths.append(depth)
            new, depth = hand.token(new, position, threshold)
    with offramp.enable(model, "confidence", threshold=threshold, kv="propagate") as run:
        out = greedy(model, one, return_dict_in_generate=True)
    assert out.sequences[0, 9:].tolist() == made
    assert run.stats.last_depths.tolist() == depths
    if 0 < threshold < 1:
        assert len(set(depths)) > 1
    for i, layer in enumerate(out.past_key_values.layers):
        # the last token of `made` is in no cache yet
        torch.testing.assert_close(layer.keys[0], torch.cat(hand.keys[i], 1)[:, : 8 + NEW], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values[0], torch.cat(hand.values[i], 1)[:, : 8 + NEW], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", ["one", "three"])
def test_catch_up_leaves_an_exact_cache(model, request, rows):
    """What waits when the text ends is run only for someone who looks at the cache, and then holds exact keys."""
    batch = request.getfixturevalue(rows)
    prompt = batch["input_ids"].shape[1]
    exits = offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2) as run:
        made = greedy(model, batch)
        assert run.stats.rounds == 1 and run.stats.saved == pytest.approx(1 - (6 + 2 * (NEW - 1)) / (6 * NEW))
        out = greedy(model, batch, return_dict_in_generate=True)
        assert torch.equal(out.sequences, made) and run.stats.rounds == 3
        cache = DynamicCache(config=model.config)
        greedy(model, batch, past_key_values=cache)
    exits.detach()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    whole = torch.cat([mask, mask.new_ones(len(mask), NEW - 1)], 1)
    where = (whole.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = model(input_ids=made[:, :-1], attention_mask=whole, position_ids=where).past_key_values
    for found in (out.past_key_values, cache):
        assert found.get_seq_length() == prompt + NEW - 1
        for mine, theirs in zip(found.layers, wanted.layers, strict=True):
            for row in range(len(mask)):
                seen = whole[row].bool()
                torch.testing.assert_close(mine.keys[row][:, seen], theirs.keys[row][:, seen], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(mine.values[row][:, seen], theirs.values[row][:, seen], rtol=1e-4, atol=1e-5)


def test_deep_blocks_run_on_all_that_waits_at_once(model, one):
    """A token that is not sure takes all before it with it: one call of the deep blocks, with their exact positions."""
    widths = []
    model.model.layers[5].mlp.register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.08) as run:
        greedy(model, one, new=30)
        widths.clear()
        greedy(model, one, new=30)
        depths = run.stats.last_depths.tolist()
    wanted, waiting = [9], 0
    for depth in depths[1:]:
        waiting += 1
        if depth == 6:
            wanted.append(waiting)
            waiting = 0
    assert widths == wanted and max(widths[1:]) > 1


def test_rows_that_ended_do_not_hold_the_others(model, three):
    """A finished row counts as sure: deep blocks run only when a live row needs them."""
    plain = greedy(model, three)
    end = int(plain[1, 13])
    offramp.attach(model, at=[2])
    for kv in ("catch_up", "propagate"):
        with offramp.enable(model, "confidence", threshold=0.08, kv=kv) as run:
            together = greedy(model, three, eos_token_id=end)
            depths = run.stats.last_depths.tolist()
            for row in range(3):
                keep = three["attention_mask"][row].bool()
                alone = {"input_ids": three["input_ids"][row : row + 1, keep]}
                made = greedy(model, alone, eos_token_id=end)[0, keep.sum() :]
                assert together[row, 11 : 11 + len(made)].tolist() == made.tolist()
                assert not together[row, 11 + len(made) :].any()
                assert run.stats.last_depths.tolist() == depths[: len(made)]
                depths = depths[len(made) :]
            assert depths == []


@pytest.mark.parametrize("rows", ["one", "three"])
@pytest.mark.parametrize("threshold", [0.0, 0.06, 0.08, 1.0])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_recompute_is_catch_up_token_for_token(model, request, rows, threshold, window):
    """What waits is computed again or kept: the same states, so the same text, depths and cache, also at the bound."""
    batch, found, caches = request.getfixturevalue(rows), [], []
    offramp.attach(model, at=[2, 4])
    for kv in ("catch_up", "recompute"):
        with offramp.enable(model, "confidence", threshold=threshold, kv=kv, window=window) as run:
            out = greedy(model, batch, return_dict_in_generate=True)
            found.append((out.sequences.tolist(), run.stats.last_depths.tolist(), run.stats.rounds))
            caches.append(out.past_key_values.layers)
            assert torch.equal(greedy(model, batch), out.sequences)
    assert found[0] == found[1]
    if window is not None and threshold == 0:  # of every window + 1 tokens the last runs the full model
        depths = found[0][1][:NEW]
        assert depths == [6, *([*[2] * window, 6] * NEW)][:NEW]
    real = slice(3 * (len(batch["input_ids"]) - 1), None)  # past the padding of every row
    for mine, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(mine.keys[..., real, :], theirs.keys[..., real, :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", ["one", "three"])
@pytest.mark.parametrize(("policy", "options"), [("confidence", {"threshold": 0.06}), ("fixed", {"depth": 4})])
def test_heads_that_read_earlier_states_read_each_once(model, request, rows, policy, options):
    """Tokens that are computed again must not be in a head's memory twice; nor may a policy that asks for no logits
    get those of an unmixed state."""
    batch, found = request.getfixturevalue(rows), []
    exits = offramp.attach(model, at=[2, 4], head="layer")
    for kv in ("catch_up", "recompute"):
        with offramp.enable(model, policy, kv=kv, window=5, **options) as run:
            found.append((greedy(model, batch).tolist(), run.stats.last_depths.tolist()))
    assert found[0] == found[1] and min(found[0][1]) < 6
    if rows == "one" and policy == "fixed":
        ids = torch.tensor(found[0][0])
        said = exits[4](exits.inputs(exits.observe({"input_ids": ids}))[1]).argmax(-1)
        for i, depth in enumerate(found[0][1]):
            assert depth == 6 or said[8 + i] == ids[0, 9 + i]


@pytest.mark.parametrize("rows", ["one", "three"])
def test_recompute_counts_what_it_runs_again(model, request, rows):
    """A call of a block is one unit per row, and each token in it that ran this block before is one more."""
    batch, spent, widths = request.getfixturevalue(rows), {}, []
    length, count = batch["input_ids"].shape[1] + 29, len(batch["input_ids"])
    offramp.attach(model, at=[2, 4])
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda m, args, out: widths.append(out.shape[1]))
    for kv in ("catch_up", "recompute"):
        with offramp.enable(model, "confidence", threshold=0.08, kv=kv) as run:
            greedy(model, batch, new=30)  # the first call probes
            run.stats.reset()
            widths.clear()
            greedy(model, batch, new=30, return_dict_in_generate=True)  # in the end every block has had every token
            spent[kv] = run.stats.blocks_run
        again = sum(widths) - 6 * length
        assert spent[kv] == count * (len(widths) + again)
        assert (again > 0) == (kv == "recompute")
    assert spent["recompute"] > spent["catch_up"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be a positive number of tokens"),
        ({"window": True, "kv": "recompute"}, "window=True must be"),
        ({"window": 4, "kv": "propagate"}, "window=4 bounds what waits"),
        ({"window": 4, "verify": True}, "with kv='catch_up', verify=True no token waits"),
    ],
)
def test_a_window_that_bounds_nothing(model, options, message):
    offramp.attach(model, at=[2])
    with pytest.raises(offramp.OfframpError, match=message):
        offramp.enable(model, "confidence", threshold=0.5, **options)


def test_the_window_of_recompute_has_a_default(model):
    offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2, kv="recompute") as run:
        assert run.options.window == 100
    with offramp.enable(model, "fixed", depth=2) as run:
        assert run.options.window is None
