"""T5 and BART from tiny configs: exits in the decoder, the encoder's part left alone, positions counted by slot."""

import copy
import itertools
import warnings

import pytest
import torch
import transformers as hf
from scipy.stats import chisquare
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import offramp
from offramp._plugins import adapt
from offramp.errors import BadArgument, UnsupportedModel
from offramp.testing.backbones import check_backbone
from offramp_hf.backbones.encoder_decoder import Bias, HandingChain, Scale

VOCAB, DEPTH, NEW, AT = 61, 6, 16, [2, 4]
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": DEPTH, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
BART = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": DEPTH, "max_position_embeddings": 64}
BART |= {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("ffn_dim", 48), ("attention_heads", 4))
}
BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 2, "init_std": 0.3}
BART |= {"forced_eos_token_id": None}
OUT = (".o.weight", ".wo.weight", "out_proj.weight", "fc2.weight")


def t5(seed=2, kind=hf.T5ForConditionalGeneration, **config):
    """A T5 whose tokens depend on one another and on the encoder, and whose deep blocks change little."""
    torch.manual_seed(seed)
    model = kind(hf.T5Config(**{**T5, **config})).eval()
    model.shared.weight.data.mul_(0.1)
    for block in model.decoder.block:
        for name, p in block.named_parameters():
            if name.endswith("q.weight"):
                p.data.mul_(4)
            if name.endswith("Attention.o.weight"):
                p.data.mul_(3)
    model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.normal_(0, 2)
    return soften(model, model.decoder.block, 0.3)


def bart(seed=2, kind=hf.BartForConditionalGeneration, **config):
    torch.manual_seed(seed)
    model = kind(hf.BartConfig(**{**BART, **config})).eval()
    model.final_logits_bias.normal_().mul_(0.3)
    return soften(model, model.model.decoder.layers, 0.03)


def soften(model, blocks, scale):
    for block in blocks[2:]:
        for name, p in block.named_parameters():
            if name.endswith(OUT):
                p.data.mul_(scale)
    return model


#: the two T5s are what T5 1.0 (scaled, tied) and 1.1 (gated, unscaled) are
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FAMILIES = {"t5": t5, "t5-gated": lambda: t5(1, **GATED), "bart": bart}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


def texts(model, rows=3):
    """Encoder inputs of different lengths, padded on the right."""
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 4:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id)[:rows], "attention_mask": mask[:rows]}


def generate(model, batch, **more):
    return model.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **more})


def blocks_of(model):
    return model.decoder.block if hasattr(model, "decoder") else model.model.decoder.layers


@pytest.fixture
def counted():
    """Count how often rows went through whole blocks, seen from inside them, and how often the encoder ran."""
    handles = []

    def start(model):
        seen = {"blocks": 0, "encoder": 0}

        def block(module, args, output):
            seen["blocks"] += output.shape[0]

        def encoder(module, args, output):
            seen["encoder"] += 1

        inner = [b.layer[-1] if hasattr(b, "layer") else b.fc2 for b in blocks_of(model)]
        handles.extend(m.register_forward_hook(block) for m in inner)
        handles.append(model.get_encoder().register_forward_hook(encoder))
        return seen

    yield start
    for handle in handles:
        handle.remove()


def test_structure_is_found(model):
    backbone = adapt(model)
    assert backbone.depth == DEPTH and backbone.names[0] in ("decoder.block.0", "model.decoder.layers.0")
    context, chain = backbone.context(), backbone.chain()
    if isinstance(model, hf.BartForConditionalGeneration):
        assert isinstance(context.finish, Bias) and not isinstance(chain, HandingChain)
    else:
        assert chain.handed == {1: 2, 2: 5} and chain.item == 1
        scaled = any(isinstance(m, Scale) for m in context.norm.modules())
        assert scaled == model.config.scale_decoder_outputs
    assert not backbone.ragged


def test_a_bias_set_later_counts():
    model = bart()
    model.final_logits_bias.zero_()
    offramp.attach(model, at=AT)
    model.final_logits_bias.normal_()
    assert torch.equal(model.exits["2"](torch.zeros(32)), model.final_logits_bias[0])


def test_contract(model):
    ids = torch.randint(3, VOCAB, (3, 7))
    check_backbone(adapt(model), {**texts(model), "decoder_input_ids": ids})


@pytest.mark.parametrize("head", ["tied", "linear", "lora", "translator"])
def test_untrained_exit_is_the_logit_lens(model, head):
    exits = offramp.attach(model, at=AT, head=head)
    kept = {}
    handle = blocks_of(model)[1].register_forward_hook(
        lambda m, a, out: kept.update(h=out[0] if type(out) is tuple else out)
    )
    with torch.no_grad():
        model(**texts(model), decoder_input_ids=torch.randint(3, VOCAB, (3, 5)))
        handle.remove()
        hidden = kept["h"]
        if isinstance(model, hf.BartForConditionalGeneration):
            wanted = hidden @ model.model.shared.weight.T + model.final_logits_bias
        else:
            normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + model.config.layer_norm_epsilon)
            normed = normed * model.decoder.final_layer_norm.weight
            wanted = (normed * 32**-0.5 if model.config.scale_decoder_outputs else normed) @ model.lm_head.weight.T
        torch.testing.assert_close(exits[2](hidden), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "draft"), [(1, 4), (3, 4), (3, None)])
def test_verified_is_plain_generate(model, rows, draft, counted):
    batch = texts(model, rows)
    wanted = generate(model, batch)
    assert max(len(set(row)) for row in wanted.tolist()) > 5
    offramp.attach(model, at=AT)
    seen = counted(model)
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=draft) as run:
        assert torch.equal(generate(model, batch), wanted)
    stats = run.stats
    assert stats.tokens == rows * NEW and stats.blocks_run == seen["blocks"] and seen["encoder"] == 1
    assert 0 <= stats.accepted < stats.drafted or draft is None
    assert stats.accepted > 0 or draft is None
    assert sum(n for d, n in stats.exits.items() if d < DEPTH) == stats.accepted
    assert torch.equal(generate(model, batch), wanted)


def test_verified_with_ends_processors_and_scores(model):
    """Rows end at different places, inside drafts too; processors see what they see in the framework's loop."""
    batch = texts(model)
    plain = generate(model, batch)
    more = {"eos_token_id": [int(plain[0, 9]), int(plain[1, 12])], "repetition_penalty": 1.3, "min_new_tokens": 4}
    more |= {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 30}
    wanted = generate(model, batch, **more)
    offramp.attach(model, at=AT)
    with offramp.enable(model, "confidence", threshold=[0.3, 0.05], verify=True, draft=3):
        got = generate(model, batch, **more)
    assert torch.equal(got.sequences, wanted.sequences)
    assert isinstance(got, hf.generation.GenerateEncoderDecoderOutput)
    for step, (one, two) in enumerate(zip(got.scores, wanted.scores, strict=True)):
        alive = (
            (wanted.sequences[:, 1 : step + 1, None] == torch.tensor(more["eos_token_id"]))
            .flatten(1)
            .any(1)
            .logical_not()
        )
        torch.testing.assert_close(one[alive], two[alive], rtol=1e-4, atol=1e-4)


def test_caches_are_the_frameworks(model):
    batch, more = texts(model), {"return_dict_in_generate": True}
    wanted = generate(model, batch, **more).past_key_values
    offramp.attach(model, at=AT)
    for options in ({"verify": True, "draft": 3, "threshold": 0.0}, {"kv": "catch_up", "threshold": 1.0}):
        with offramp.enable(model, "confidence", **options):
            got = generate(model, batch, **more).past_key_values
        assert got.is_updated == wanted.is_updated and got.get_seq_length() == wanted.get_seq_length() == NEW
        for part in ("self_attention_cache", "cross_attention_cache"):
            pairs = zip(getattr(got, part).layers, getattr(wanted, part).layers, strict=True)
            for one, two in pairs:
                torch.testing.assert_close(one.keys, two.keys, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(one.values, two.values, rtol=1e-4, atol=1e-4)


def test_decoder_prompts_with_padding(model):
    """A forced start of several tokens, one row padded on the left."""
    batch, pad = texts(model, 2), model.config.pad_token_id
    start = torch.tensor([[pad, pad, 2, 7], [2, 9, 11, 8]])
    batch |= {"decoder_input_ids": start, "decoder_attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    wanted = generate(model, batch)
    offramp.attach(model, at=AT)
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3) as run:
        assert torch.equal(generate(model, batch), wanted)
    assert run.stats.rounds > 1


def by_hand(model, chain, batch, row, threshold):
    """Lossy decoding the slow way: everything is recomputed for every token, which decides at its first sure exit."""
    one = {k: v[row : row + 1] for k, v in batch.items()}
    ids, depths = torch.tensor([[model.config.decoder_start_token_id]]), []
    for step in range(NEW):
        with chain.capture(AT) as kept, torch.no_grad():
            answer, depth = model(**one, decoder_input_ids=ids, use_cache=False).logits[0, -1], DEPTH
        for d in AT if step else ():  # the first token comes from the prefill, which is full
            early = model.exits[str(d)](kept[d][0, -1])
            if early.softmax(-1).max() >= threshold:
                answer, depth = early, d
                break
        ids = torch.cat([ids, answer.argmax().view(1, 1)], 1)
        depths.append(depth)
    return ids[0].tolist(), depths


@pytest.mark.parametrize("rows", [1, 3])
def test_catch_up_is_exact(model, rows, counted):
    batch = texts(model, rows)
    exits = offramp.attach(model, at=AT)
    chain = exits.backbone.chain()
    with chain.capture([2]) as kept, torch.no_grad():
        model(**batch, decoder_input_ids=generate(model, batch))
        threshold = float(exits[2](kept[2]).softmax(-1).amax(-1).flatten().quantile(0.6)) + 1e-4
    wanted = [by_hand(model, chain, batch, row, threshold) for row in range(rows)]
    seen = counted(model)
    with offramp.enable(model, "confidence", threshold=threshold) as run:
        got = generate(model, batch)
    assert got.tolist() == [ids for ids, _ in wanted]
    assert run.stats.last_depths.tolist() == [d for _, depths in wanted for d in depths]
    assert len(run.stats.exits) > 1 and seen == {"blocks": run.stats.blocks_run, "encoder": 1}
    assert run.stats.blocks_run <= run.stats.blocks_full - (rows == 1)  # rows that stopped wait for one that goes on


@pytest.mark.parametrize("rows", [1, 3])
def test_propagate_runs_what_it_says(model, rows, counted):
    offramp.attach(model, at=AT)
    seen = counted(model)
    with offramp.enable(model, "confidence", threshold=0.0, kv="propagate") as run:
        got = generate(model, texts(model, rows))
    assert got.shape == (rows, NEW + 1)
    assert seen == {"blocks": run.stats.blocks_run, "encoder": 1}
    # one full prefill; then two blocks per token, and keys and values of the four others
    assert run.stats.blocks_run == rows * (DEPTH + 2 * (NEW - 1)) and run.stats.projected == rows * 4 * (NEW - 1)


def test_t5_with_a_short_decoder():
    """The framework makes a cache for the encoder's depth; the layers that nobody fills stay empty."""
    model = t5(num_layers=8, num_decoder_layers=DEPTH)
    wanted = generate(model, texts(model))
    offramp.attach(model, at=AT)
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3, strict=True):
        got = generate(model, texts(model), return_dict_in_generate=True)
    assert torch.equal(got.sequences, wanted) and len(got.past_key_values.self_attention_cache.layers) == 8


def test_sampling_keeps_the_distribution():
    """Three tokens of a vocabulary of five, eight rows at a time, against their exact probabilities."""
    vocab, new, draws = 5, 3, 150
    model = t5(vocab_size=vocab, num_layers=3)
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    every = torch.tensor([[0, *ids] for ids in itertools.product(range(vocab), repeat=new)])
    with torch.no_grad():
        rows = {k: v.expand(len(every), -1) for k, v in batch.items()}
        logs = (model(**rows, decoder_input_ids=every[:, :-1]).logits / 0.1).log_softmax(-1)
    exact = logs.gather(-1, every[:, 1:, None]).sum((1, 2)).exp()
    offramp.attach(model, at=[1])
    counts = torch.zeros(len(every))
    place = vocab ** torch.arange(new - 1, -1, -1)
    sample = {"do_sample": True, "top_k": 0, "temperature": 0.1, "num_return_sequences": 8, "max_new_tokens": new}
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=2) as run:
        for _ in range(draws):
            made = model.generate(**batch, **sample)[:, 1:]
            counts += torch.bincount((made * place).sum(-1), minlength=len(every))
    assert 0 < run.stats.accepted < run.stats.drafted
    wanted = exact.double() / exact.double().sum() * counts.sum()
    rare = wanted < 5
    seen, wanted = (torch.cat([t[~rare], t[rare].sum()[None]]).numpy() for t in (counts.double(), wanted))
    assert rare.any() and chisquare(seen, wanted).pvalue > 0.001


def test_beam_search_falls_back_with_one_warning(model):
    batch = texts(model)
    wanted = generate(model, batch, num_beams=2)
    offramp.attach(model, at=AT)
    with offramp.enable(model, "confidence", threshold=0.0, verify=True) as run:
        with pytest.warns(UserWarning, match="early exit is off for this call: beam search"):
            assert torch.equal(generate(model, batch, num_beams=2), wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(generate(model, batch, num_beams=2), wanted)
    assert run.stats.blocks_run == 0
    with (
        offramp.enable(model, "confidence", threshold=0.0, verify=True, strict=True),
        pytest.raises(RuntimeError, match="beam search"),
    ):
        generate(model, batch, num_beams=2)


def marks(model):
    return {
        f"{name}.{key}": list(value) if isinstance(value, dict) else id(value)
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
    }


class Fails(hf.LogitsProcessor):
    def __init__(self, error, after):
        self.error, self.left = error, after

    def __call__(self, ids, scores):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return scores


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"verify": True, "draft": 3}, KeyboardInterrupt()),
        ({"kv": "catch_up"}, ValueError("mine")),
        ({"kv": "propagate"}, ValueError("mine")),
    ],
    ids=["verify", "catch_up", "propagate"],
)
def test_everything_is_undone(model, options, error):
    batch, before, keys = texts(model), marks(model), set(model.state_dict())
    wanted = generate(model, batch)
    logits = model(**batch, decoder_input_ids=wanted).logits
    exits = offramp.attach(model, at=AT)
    attached = marks(model)
    with offramp.enable(model, "confidence", threshold=0.0, **options):
        first = generate(model, batch)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for after in (2, 7):
            with pytest.raises(type(error)):
                generate(model, batch, logits_processor=[Fails(error, after)], past_key_values=cache)
            assert not any(cache.is_updated.values()) and cache.get_seq_length() == 0  # the same call can be made again
        assert torch.equal(generate(model, batch, past_key_values=cache), first)
    assert marks(model) == attached and torch.equal(generate(model, batch), wanted)
    exits.detach()
    assert marks(model) == before and set(model.state_dict()) == keys
    assert torch.equal(generate(model, batch), wanted)
    assert torch.equal(model(**batch, decoder_input_ids=wanted).logits, logits)


def test_copies_have_their_own_hooks(model):
    wanted = generate(model, texts(model))
    offramp.attach(model, at=AT)
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3) as run:
        other = copy.deepcopy(model)
        for p in model.parameters():
            p.data.zero_()
        assert torch.equal(generate(other, texts(other)), wanted)
        assert run.stats.tokens == 0


def test_observe(model):
    batch, pad = texts(model), model.config.pad_token_id
    labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100], [11, 12, 13, pad]])
    backbone = adapt(model)
    with torch.no_grad():  # gradients are the caller's choice, and pick other kernels
        seen = backbone.observe({**batch, "labels": labels}, [2])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    with backbone.chain().capture([2, DEPTH]) as kept, torch.no_grad():
        logits = model(**batch, decoder_input_ids=shifted).logits
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    assert torch.equal(seen.hidden[0], kept[2][keep]) and torch.equal(seen.final, kept[DEPTH][keep])
    assert seen.targets.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert seen.position.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2] and seen.sample.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    torch.testing.assert_close(backbone.context().readout(seen.final), logits[keep])
    made = backbone.observe({**batch, "decoder_input_ids": shifted}, [2])
    assert made.targets is None and len(made.final) == 4 + 3 + 4  # inputs are one behind the labels
    with pytest.raises(BadArgument, match="input_ids and labels"):
        backbone.observe(batch, [2])


def test_fit_record_calibrate(model):
    batch = texts(model)
    data = {**batch, "decoder_input_ids": generate(model, batch)}
    offramp.attach(model, at=AT)
    before = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("exits")}
    offramp.fit(model, data, loss="distill", steps=3)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    trace = offramp.record(model, data)
    assert trace.depths == (*AT, DEPTH) and 3 * NEW // 2 < len(trace) <= 3 * (NEW + 1)


class Squared(hf.BartForConditionalGeneration):
    """Its readout is no projection."""

    def forward(
        self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
        encoder_outputs=None, past_key_values=None, **more,
    ):  # fmt: skip
        out = super().forward(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            **more,
        )
        out.logits = out.logits**2
        return out


def whispering():
    """Something passes from the first block to the second beside the state."""
    model, heard = bart(), {}
    model.model.decoder.layers[0].register_forward_hook(lambda m, a, out: heard.update(x=out))
    model.model.decoder.layers[1].register_forward_hook(lambda m, a, out: out + heard["x"])
    return model


PROPHET = {f"num_{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
REFUSED = {
    "readout": (lambda: bart(kind=Squared), "its readout is not understood"),
    "state": (whispering, "what passes between its blocks is not understood"),
    "speech": (lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**BART)), "does not take input_ids"),
    "no unembedding": (lambda: hf.T5Model(hf.T5Config(**T5)), "has no unembedding"),
    "two streams": (
        lambda: hf.ProphetNetForConditionalGeneration(hf.ProphetNetConfig(vocab_size=VOCAB, hidden_size=32, **PROPHET)),
        "cannot be run block by block",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(case):
    build, reason = REFUSED[case]
    model = build().eval()
    before = marks(model)
    with pytest.raises(UnsupportedModel, match=reason):
        offramp.attach(model, at=[1])
    assert marks(model) == before


OTHERS = {
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)),
    "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**BART)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART)),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART)),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_work_by_structure(family):
    model = OTHERS[family]().eval()
    wanted = generate(model, texts(model))
    offramp.attach(model, at=AT)
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=3, strict=True) as run:
        assert torch.equal(generate(model, texts(model)), wanted)
    assert run.stats.drafted > 0
