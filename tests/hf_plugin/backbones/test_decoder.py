"""Decoder-only language models of many families, from tiny configs: readout, lossless and lossy decoding, refusals."""

import pytest
import torch
import transformers as hf

import offramp
from offramp._plugins import adapt
from offramp.errors import UnsupportedModel
from offramp_hf.cache import GrowingLayer, WindowCache
from offramp_hf.decode.direct import Direct
from offramp_hf.decode.direct_rows import DirectRows
from offramp_hf.decode.place import Place
from offramp_hf.decode.runner import Through

DEPTH, VOCAB, NEW = 6, 97, 10
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4, **IDS}
BASE |= {"initializer_range": 0.2}
WIDE = {**BASE, "intermediate_size": 64, "max_position_embeddings": 64}
GROUPED = {**WIDE, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 60}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 64, **IDS}
OPT = {**BASE, "ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.2}
MPT = {"vocab_size": VOCAB, "d_model": 32, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 64, **IDS}
MOE = {**GROUPED, "num_local_experts": 4, "sliding_window": None}
GEMMA3 = {**GEMMA, "sliding_window_pattern": 2}

FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=60)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA3)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, initializer_range=0.2)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=32)),
    "opt-projected": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**WIDE)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDE)),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=DEPTH, n_head=4, initializer_range=0.2, **IDS)
    ),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**BASE, alibi=False)),
    "falcon-alibi": lambda: hf.FalconForCausalLM(hf.FalconConfig(**BASE, alibi=True)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(**MPT, initializer_range=0.2, use_cache=True)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MOE)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**GROUPED, logits_scaling=2.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED, logit_scale=0.5)),
}
#: rotary models whose blocks can be called straight; the others make what their blocks take from the cache or the mask
STRAIGHT = set(FAMILIES) - {"gpt2", "opt", "opt-projected", "bloom", "falcon-alibi", "mpt"}
#: what a block adds to the state is scaled where these weights write to it
OUT = ("o_proj.weight", "out_proj.weight", "down_proj", "c_proj.weight", "dense.weight", "4h_to_h.weight", "fc2.weight")
SCALES = {"gemma2": -0.7, "gemma3": -0.7, "olmo2": 0.1}  # their norms stand behind the projections; Gemma's add one


def soften(model, family="llama", first=2):
    """Make deep blocks nearly the identity, so that some early answers are the full model's and some are not."""
    for block in adapt(model).blocks[first:]:
        for name, p in block.named_parameters():
            behind = "post_attention_layernorm" in name or "post_feedforward_layernorm" in name
            if family in SCALES:
                if behind:
                    p.data.fill_(SCALES[family])
            elif name.endswith(OUT):
                p.data.mul_(0.1)
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    torch.manual_seed(1)
    model = soften(FAMILIES[family]().eval(), family)
    model.generation_config.eos_token_id = None
    return model


def padded(n=3, length=11):
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(n):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, batch, new=NEW):
    return model.generate(**batch, max_new_tokens=new, do_sample=False)[:, -new:]


def alone(batch, row):
    keep = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row : row + 1, keep]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def states(model, ids, depths):
    """The exact states [depth][1, length, width] of a prompt, without any cache."""
    with adapt(model).chain().capture(depths) as kept, torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return kept, logits


def lossy_by_hand(model, ids, threshold, new=NEW):
    """Catch-up decoding the slow way: all is recomputed for every token, which decides at its first sure exit."""
    heads = {int(d): h for d, h in model.exits.items()}
    made, depths = [], []
    for step in range(new):
        kept, logits = states(model, ids, list(heads))
        answer, depth = logits[0, -1], DEPTH
        for d, head in heads.items() if step else ():  # the first token comes from the prefill, which is full
            early = head(kept[d][0, -1])
            if early.softmax(-1).max() >= threshold:
                answer, depth = early, d
                break
        made.append(int(answer.argmax()))
        depths.append(depth)
        ids = torch.cat([ids, torch.tensor([[made[-1]]])], 1)
    return made, depths


def middle(model, ids):
    """A threshold that some tokens pass at the first exit, some at the second, and some nowhere."""
    kept, _ = states(model, ids, [1, 3])
    sure = torch.stack([model.exits[str(d)](kept[d][0]).softmax(-1).amax(-1) for d in (1, 3)]).detach()
    return float(sure.flatten().quantile(0.6)) + 1e-4


def test_untrained_exit_is_the_logit_lens(model):
    """By hand: the model's own code after its last block, on a state that the deeper blocks left alone."""
    batch, chain = padded(2, 9), adapt(model).chain()
    wanted = {}
    for depth in (1, 4):
        undo = chain.install(lambda i, call, depth=depth: call.run() if i < depth else call.skip())
        with torch.no_grad():
            wanted[depth] = model(**batch).logits
        undo()
    offramp.attach(model, at=[1, 4])
    with adapt(model).chain().capture([1, 4]) as kept, torch.no_grad():
        full = model(**batch).logits
        for depth, want in wanted.items():
            torch.testing.assert_close(model.exits[str(depth)](kept[depth]), want, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(want, full, rtol=1e-4, atol=1e-5)


def test_lossless(model, family):
    one, three = {"input_ids": torch.arange(5, 14)[None]}, padded()
    wanted, wanted3 = generate(model, one), generate(model, three)
    offramp.attach(model, at=[2, 4])
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=4) as run:
        assert torch.equal(generate(model, one), wanted)
        assert run.stats.drafted > 0
        run.stats.reset()
        assert torch.equal(generate(model, three), wanted3)
        assert 0 < run.stats.accepted < run.stats.drafted, "some drafts must be kept and some thrown away"
        counts = [len(run.stats.last_depths), run.stats.tokens, sum(run.stats.exits.values())]
        assert counts == [3 * NEW] * 3


def check_catch_up(model, threshold):
    three = padded()
    with offramp.enable(model, "confidence", threshold=threshold) as run:
        together = generate(model, three)
        spread = run.stats.last_depths.view(3, NEW)
        for row in range(3):
            prompt = alone(three, row)
            made, depths = lossy_by_hand(model, prompt["input_ids"], threshold)
            assert generate(model, prompt)[0].tolist() == made == together[row].tolist()
            assert run.stats.last_depths.tolist() == depths == spread[row].tolist()
    return spread.unique().tolist()


def test_catch_up_is_exact_in_every_deep_block(model):
    """Tokens and exit depths equal those of a decoder without any cache, and rows of a batch those of rows alone."""
    offramp.attach(model, at=[1, 3])
    assert {1, DEPTH} <= set(check_catch_up(model, middle(model, torch.arange(5, 14)[None])))


@pytest.mark.parametrize(("threshold", "depths"), [(0.0, [1, DEPTH]), (1.0, [DEPTH])])
def test_catch_up_at_the_ends(threshold, depths):
    """Always early (the first token comes from the prefill), and never."""
    model = soften(FAMILIES["llama"]().eval())
    model.generation_config.eos_token_id = None
    offramp.attach(model, at=[1, 3])
    assert check_catch_up(model, threshold) == depths


def test_propagate_rows_are_independent(model):
    offramp.attach(model, at=[1, 3])
    three, threshold = padded(), middle(model, torch.arange(5, 14)[None])
    with offramp.enable(model, "confidence", threshold=threshold, kv="propagate") as run:
        together, depths = generate(model, three), run.stats.last_depths.view(3, NEW)
        assert len(depths.unique()) > 1
        for row in range(3):
            assert torch.equal(generate(model, alone(three, row))[0], together[row])
            assert torch.equal(run.stats.last_depths, depths[row])
        assert run.stats.projected > 0


def test_runners(model, family, monkeypatch):
    """Blocks are called straight where a probe shows that to be exact, else through the model: the same tokens."""
    backbone, used = adapt(model), []
    cache = WindowCache([GrowingLayer() for _ in range(DEPTH)])
    assert type(backbone.runner(cache, 1, False, {})) is (Direct if family in STRAIGHT else Through)
    rows = DirectRows if family in STRAIGHT else Through
    assert type(backbone.runner(cache, 2, False, {})) is type(backbone.runner(cache, 1, True, {})) is rows
    exits = offramp.attach(model, at=[2])
    prompt = {"input_ids": torch.arange(5, 14)[None]}
    found = {}
    for fits in (backbone.direct_fits, False):
        monkeypatch.setitem(exits.backbone.__dict__, "direct_fits", fits)
        monkeypatch.setattr(Direct, "window", _noting(Direct.window, used))
        for options in ({"verify": True, "draft": 3}, {}, {"kv": "propagate"}):
            with offramp.enable(model, "confidence", threshold=0.1, **options) as run:
                made = generate(model, prompt).tolist(), run.stats.last_depths.tolist(), run.stats.blocks_run
                assert found.setdefault(str(options), made) == made
        assert bool(used) == fits
        used.clear()


def _noting(window, used):
    def noting(self, *args, **kwargs):
        used.append(args)
        return window(self, *args, **kwargs)

    return noting


def test_windows_are_exact(model):
    """States after any split of the blocks, over a cache whose layers are not equally long, are the model's own."""
    backbone, ids = adapt(model), torch.arange(5, 12)[None]
    kept, _ = states(model, ids, [2, DEPTH])
    cache = WindowCache([GrowingLayer() for _ in range(DEPTH)])
    run, place, shallow = Through(backbone, cache, {}), Place(None), []
    with torch.no_grad():
        for at in range(7):  # the shallow blocks go token by token, the deep ones follow in two windows
            shallow.append(run.window(ids[:, at : at + 1], 0, 2, None, place))
            if at in (3, 6):
                waiting = torch.cat(shallow[-4:] if at == 3 else shallow[-3:], 1)
                tokens = ids[:, at + 1 - waiting.shape[1] : at + 1]
                deep = run.window(tokens, 2, DEPTH, waiting, place)
    torch.testing.assert_close(torch.cat(shallow, 1), kept[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deep, kept[DEPTH][:, 4:], rtol=1e-4, atol=1e-5)


REFUSED = {
    "state": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4)),
        "MambaForCausalLM takes no past_key_values",
    ),
    "hybrid": (
        lambda: hf.FalconH1ForCausalLM(
            hf.FalconH1Config(**{**GROUPED, "num_hidden_layers": 4}, mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64)
        ),
        "FalconH1ForCausalLM cannot be run block by block",
    ),
    "part": (lambda: hf.LlamaModel(hf.LlamaConfig(**GROUPED)), "LlamaModel"),
    "encoder": (
        lambda: hf.T5EncoderModel(hf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=4)),
        "T5EncoderModel returns no logits",
    ),
}


def marks(model):
    return {f"{n}.{k}": id(v) for n, m in model.named_modules() for k, v in m.__dict__.items() if "hook" not in k}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(kind):
    build, reason = REFUSED[kind]
    model = build()
    before, keys = marks(model), list(model.state_dict())
    with pytest.raises(UnsupportedModel, match=reason):
        offramp.attach(model, at=[2])
    assert marks(model) == before and list(model.state_dict()) == keys


def test_shared_keys_and_values_are_refused():
    """A block that reads the keys and values of another cannot run later than it."""
    model = FAMILIES["llama"]().eval()

    class Borrowed:
        def __init__(self, cache):
            self.cache = cache

        def update(self, *given):
            return self.cache.layers[3].keys, self.cache.layers[3].values

    def borrow(module, args, kwargs):
        if kwargs["past_key_values"] is not None:
            kwargs["past_key_values"] = Borrowed(kwargs["past_key_values"])
        return args, kwargs

    model.model.layers[4].self_attn.register_forward_pre_hook(borrow, with_kwargs=True)
    with pytest.raises(UnsupportedModel, match=r"blocks \[4\] do not store keys and values of their own"):
        offramp.attach(model, at=[2])


def test_a_state_beside_the_chain_is_refused():
    """Blocks that hand each other more than the hidden state do not give the model's own logits in windows."""
    model, memory = FAMILIES["llama"]().eval(), {}

    def remember(module, args, output):
        memory["state"] = output

    def recall(module, args, output):
        return output + memory["state"].mean(1, keepdim=True)

    model.model.layers[0].register_forward_hook(remember)
    model.model.layers[3].register_forward_hook(recall)
    with pytest.raises(UnsupportedModel, match="what passes between its blocks is not understood"):
        offramp.attach(model, at=[2])


def test_another_readout_is_refused():
    model = FAMILIES["llama"]().eval()

    def shift(module, args, output):
        output["logits"] = output["logits"] + 1

    model.register_forward_hook(shift)
    with pytest.raises(UnsupportedModel, match="its readout is not understood"):
        offramp.attach(model, at=[2])


def test_record_by_hand():
    """What a trace holds of a padded batch, from the model's own forwards row by row."""
    torch.manual_seed(1)
    model = soften(FAMILIES["llama"]().eval())
    offramp.attach(model, at=[1, 3])
    batch = padded()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    trace, row = offramp.record(model, batch, batch_size=2, logits=True), 0
    for i in range(3):
        ids = alone(batch, i)["input_ids"]
        kept, full = states(model, ids, [1, 3, DEPTH])
        for at in range(ids.shape[1] - 1):  # the last token has no next one to be right about
            with torch.no_grad():
                said = torch.stack([*(model.exits[str(d)](kept[d][0, at]) for d in (1, 3)), full[0, at]])
            torch.testing.assert_close(trace.logits[row], said, rtol=1e-4, atol=1e-4)
            p = said.softmax(-1)
            best = p.topk(2, -1).values
            torch.testing.assert_close(trace.stats["top1"][row], best[:, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(trace.stats["margin"][row], best[:, 0] - best[:, 1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(trace.stats["entropy"][row], -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-4)
            near = torch.cosine_similarity(kept[3][0, at], kept[1][0, at], -1)
            torch.testing.assert_close(trace.stats["cosine"][row, 1], near, rtol=1e-4, atol=1e-5)
            assert trace.label[row].tolist() == said.argmax(-1).tolist()
            torch.testing.assert_close(trace.losses[row], -p[:, ids[0, at + 1]].log(), rtol=1e-4, atol=1e-4)
            assert (trace.targets[row], trace.position[row]) == (ids[0, at + 1], at)
            row += 1
    assert len(trace) == row and trace.depths == (1, 3, DEPTH) and trace.classes == VOCAB


def test_fit_makes_exits_agree(request):
    """A few steps on real text: every exit agrees with the model more often, and the model itself is as before."""
    folder = request.config.rootpath / "tests/assets/pycode-5m"
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((folder / "heldout.txt").read_text()[:12000], return_tensors="pt").input_ids[0]
    data = ids[: len(ids) // 64 * 64].view(-1, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(data[:1]).logits
    exits = offramp.attach(model, at=[4, 8], head="translator", rank=16)
    report = offramp.fit(model, data, steps=25, lr=3e-3, rows=256, progress=False)
    assert all(report.agreement[d] > report.before[d] + 0.03 for d in (4, 8)), report
    assert report.losses[-1] < report.losses[0]
    exits.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(data[:1]).logits, wanted)
