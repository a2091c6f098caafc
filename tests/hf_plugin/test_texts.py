"""Risk of whole texts: tables by hand, the walk over them, what is recorded, and the promise on fresh prompts."""

import math

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import offramp
from offramp.errors import BadArgument, DamagedFile, NotAttached, UnknownName
from offramp.pvalues import hoeffding_bentkus_p
from offramp_hf.similarity import rouge_l, token_f1
from offramp_hf.texts import TextTrace, record_texts

RUNGS = (0.9, 0.6, 0.3)


@pytest.fixture
def model():
    """A small Llama whose deep blocks change little; it ends texts with token 2, if ever."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=61, num_key_value_heads=2, initializer_range=0.2, eos_token_id=2, **sizes)
    config.pad_token_id = 0
    found = hf.LlamaForCausalLM(config).eval()
    for block in found.model.layers[1:]:
        block.self_attn.o_proj.weight.data.mul_(0.3)
        block.mlp.down_proj.weight.data.mul_(0.3)
    offramp.attach(found, at=[1, 2])
    return found


@pytest.fixture
def prompts():
    make = torch.Generator().manual_seed(0)
    return [torch.randint(3, 61, (n,), generator=make) for n in (4, 7, 5, 6, 4, 8)]


def table(losses, **more):
    """A trace of a table of losses [prompts][rungs]."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    ladder = tuple(offramp.policy("confidence", threshold=t) for t in RUNGS)
    given = {"ladder": ladder, "risk": "textual_consistency:rouge_l", "limit": 0.5, "tokens": 8, "model_hash": "m"}
    return TextTrace(losses, losses + 1, options={"kv": "propagate"}, **{**given, **more})


def test_the_walk_by_hand():
    """Mean losses 0, 0.05, 0.3 over 100 prompts: at alpha 0.2 the second rung is the last that passes."""
    trace = table([[0.0, 0.1, 0.6], [0.0, 0.0, 0.0]] * 50)
    cal = trace.calibrate(alpha=0.2, delta=0.05)
    certificate = cal.certificate
    assert cal.policy.threshold == 0.6
    assert certificate.p_value == pytest.approx(hoeffding_bentkus_p(0.05, 100, 0.2))
    assert (certificate.risk, certificate.n, certificate.test) == (trace.risk, 100, "hoeffding_bentkus")
    assert certificate.order == RUNGS and certificate.data_hash == trace.data_hash and certificate.model_hash == "m"
    assert cal.options == {"kv": "propagate"} and "greedy texts of up to 8 tokens" in cal.note
    assert trace.calibrate(alpha=0.01).policy.name == "never"  # 299 prompts are needed for that
    assert "At least 299 rows are needed" in trace.calibrate(alpha=0.01).note


def test_what_was_not_run_is_not_promised():
    """Two of three rungs were run, and both pass: the third stays untested; an alpha beyond the limit is refused."""
    cut = table([[0.0, 0.0]] * 100)
    assert cut.calibrate(alpha=0.2).policy.threshold == 0.6
    with pytest.raises(BadArgument, match=r"alpha=0.6 is not below limit=0.5.*limit=1\)"):
        cut.calibrate(alpha=0.6)
    assert table([[0.0] * 3] * 100).calibrate(alpha=0.6).policy.threshold == 0.3


def test_rows_and_files(tmp_path):
    trace = table(torch.rand(9, 3))
    assert len(trace) == 9 and len(trace[2:5]) == 3 and len(trace[[1, 1, 0]]) == 3 and len(trace[4]) == 1
    assert torch.equal(trace[[3, 1]].losses, trace.losses[[3, 1]])
    assert torch.equal(trace[torch.arange(9) > 6].depths, trace.depths[7:])
    with pytest.raises(BadArgument, match="no prompts to calibrate on"):
        trace[[]].calibrate()
    trace.save(tmp_path / "t")
    found = TextTrace.load(tmp_path / "t")
    assert found.data_hash == trace.data_hash and found.ladder == trace.ladder and found.options == trace.options
    assert trace[:5].data_hash != trace.data_hash != table(trace.losses, tokens=9).data_hash


def test_damaged_files_are_refused(tmp_path):
    trace, path = table(torch.rand(9, 3)), tmp_path / "t"
    trace.save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="data_hash differs|not complete"):
        TextTrace.load(path)
    save_file({"losses": torch.zeros(1, 1)}, path)
    with pytest.raises(DamagedFile, match="no text trace"):
        TextTrace.load(path)


@pytest.mark.parametrize("losses", [torch.zeros(3), torch.zeros(3, 4), torch.full((3, 2), 1.5), torch.full((3, 2), -1)])
def test_bad_tables_are_refused(losses):
    with pytest.raises(BadArgument, match="must"):
        table(losses)


def greedy(model, prompt, new=8):
    text = model.generate(prompt[None], max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()
    return text[:-1] if text[-1] == 2 else text


def test_the_table_is_what_generating_says(model, prompts):
    trace = record_texts(model, prompts, "confidence", max_new_tokens=8, every=20, limit=1.0, progress=False)
    assert trace.losses.shape == (6, 6) and trace.risk == "textual_consistency:rouge_l" and trace.tokens == 8
    full = [greedy(model, p) for p in prompts]
    for rung, policy in enumerate(trace.ladder):
        with offramp.enable(model, policy, kv="propagate") as run:
            for row, prompt in enumerate(prompts):
                run.stats.reset()
                assert trace.losses[row, rung] == pytest.approx(1 - rouge_l(greedy(model, prompt), full[row]))
                assert trace.depths[row, rung] == pytest.approx(run.stats.depth_mean)
    assert not trace.losses[:, 0].any() and trace.losses[:, -1].any()
    assert (trace.depths[:, -1] < trace.depths[:, 0]).all()


def test_risk_consistency_is_clipped_row_by_row(model, prompts):
    """The references are what the boldest rung writes: there the early texts are better, which earns nothing."""
    with offramp.enable(model, "confidence", threshold=0.0, kv="propagate"):
        goals = [greedy(model, p) for p in prompts]
    full = [token_f1(greedy(model, p), g) for p, g in zip(prompts, goals, strict=True)]
    assert min(full) < 1
    given = {"max_new_tokens": 8, "references": goals, "metric": "token_f1", "every": 30, "limit": 1.0}
    trace = record_texts(model, prompts, "confidence", progress=False, **given)
    assert trace.risk == "risk_consistency:token_f1" and bool((trace.losses >= 0).all())
    for rung, policy in enumerate(trace.ladder):
        with offramp.enable(model, policy, kv="propagate"):
            early = [token_f1(greedy(model, p), g) for p, g in zip(prompts, goals, strict=True)]
        wanted = [max(0.0, f - e) for f, e in zip(full, early, strict=True)]
        assert trace.losses[:, rung].tolist() == pytest.approx(wanted)


def test_no_bolder_rung_is_run_once_one_has_failed(model, prompts):
    whole = record_texts(model, prompts, "confidence", max_new_tokens=8, every=4, limit=1.0, progress=False)
    first = int((whole.losses.mean(0) > 0.05).nonzero()[0])
    cut = record_texts(model, prompts, "confidence", max_new_tokens=8, every=4, limit=0.05, progress=False)
    assert torch.equal(cut.losses, whole.losses[:, : first + 1]) and cut.ladder == whole.ladder
    assert first + 1 < len(whole.ladder)


def test_enable_runs_a_calibration_as_it_was_recorded(model, prompts, tmp_path):
    trace = record_texts(model, prompts * 5, "confidence", max_new_tokens=4, every=10, progress=False)
    cal = trace.calibrate(alpha=0.3, delta=0.2)
    cal.save(tmp_path / "c")
    cal = offramp.Calibration.load(tmp_path / "c")
    with offramp.enable(model, cal) as run:
        assert run.options.kv == "propagate" and run.policy == cal.policy
    with pytest.warns(UserWarning, match="made with {'kv': 'propagate'}: its certificate does not hold"):
        offramp.enable(model, cal, kv="catch_up").disable()
    model.lm_head.weight.data.mul_(2)
    with pytest.raises(BadArgument, match="made with other weights"):
        offramp.enable(model, cal)
    with offramp.enable(model, cal, force=True) as run:
        assert run.certificate is None and run.policy == cal.policy


def test_strings_need_a_tokenizer(model):
    def tokenizer(text):
        return hf.BatchEncoding({"input_ids": [3 + ord(c) % 50 for c in text]})

    texts = record_texts(model, ["abc", "xyzzy"], "confidence", tokenizer=tokenizer, every=60, progress=False)
    assert len(texts) == 2
    with pytest.raises(BadArgument, match="strings need tokenizer="):
        record_texts(model, ["abc"], "confidence", progress=False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"metric": "rouge_k"}, UnknownName, "did you mean 'rouge_l'"),
        ({"policy": "never"}, BadArgument, "no threshold to calibrate"),
        ({"policy": "confidense"}, UnknownName, "did you mean 'confidence'"),
        ({"thresold": 1}, UnknownName, "did you mean 'threshold'"),
        ({"kv": "nothing"}, BadArgument, "kv='nothing'"),
        ({"every": 0}, BadArgument, "every=0"),
        ({"limit": 0.0}, BadArgument, "limit=0.0"),
        ({"prompts": []}, BadArgument, "prompts must be texts.*there is none"),
        ({"prompts": "abc"}, BadArgument, "str is not a list of them"),
        ({"prompts": torch.zeros(2, 3)}, BadArgument, "torch.float32"),
        ({"references": [[1]]}, BadArgument, "1 references for 6 prompts"),
    ],
)
def test_what_is_refused_changes_nothing(model, prompts, given, error, message):
    before = dict(model.__dict__)
    with pytest.raises(error, match=message):
        record_texts(model, **{"prompts": prompts, "policy": "confidence", "progress": False, **given})
    assert model.__dict__ == before


def test_without_exits(model, prompts):
    model.exits = None
    del model.exits
    model.__dict__.pop("_offramp_exits")
    with pytest.raises(NotAttached):
        record_texts(model, prompts, "confidence")


def test_encoder_decoder_texts():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4}
    model = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=61, decoder_start_token_id=0, **sizes)).eval()
    offramp.attach(model, at=[2])
    prompts = torch.randint(3, 61, (3, 6))
    trace = record_texts(model, prompts, "confidence", max_new_tokens=6, every=50, limit=1.0, progress=False)
    with offramp.enable(model, trace.ladder[-1], kv="propagate"):
        early = [model.generate(p[None], max_new_tokens=6, do_sample=False)[0, 1:].tolist() for p in prompts]
    full = [model.generate(p[None], max_new_tokens=6, do_sample=False)[0, 1:].tolist() for p in prompts]
    end = model.generation_config.eos_token_id
    cut = [[t for t in text if t != end] for text in early + full]
    wanted = [1 - rouge_l(e, f) for e, f in zip(cut[:3], cut[3:], strict=True)]
    assert trace.losses[:, -1].tolist() == pytest.approx(wanted)


# A population whose risk is known exactly: at rung r of 100 a prompt goes wrong with chance r / 100 and then loses 1,
# or 0.5 with chance 0.2, so the risk of rung r is 0.9 r / 100.
ALPHA, DELTA, TRIALS, PROMPTS = 0.2, 0.2, 400, 60
LADDER = tuple(offramp.policy("confidence", threshold=1 - r / 100) for r in range(100))


def test_the_promise_on_fresh_prompts_of_a_known_population():
    random, broken, bold = np.random.default_rng(0), 0, []
    for _ in range(TRIALS):
        wrong, little = random.uniform(size=(2, PROMPTS, 1))
        losses = np.where(wrong < np.arange(100) / 100, np.where(little < 0.2, 0.5, 1.0), 0.0)
        cal = table(losses, ladder=LADDER).calibrate(alpha=ALPHA, delta=DELTA)
        r = 0 if cal.certificate is None else round(100 * (1 - cal.policy.threshold))
        broken += 0.9 * r / 100 > ALPHA
        bold.append(r)
    assert broken / TRIALS <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / TRIALS)
    assert broken / TRIALS > 0.02 and 12 <= np.median(bold) <= 22  # no pushover, and not bought by doing nothing


@pytest.mark.slow
def test_the_promise_on_fresh_prompts_of_the_testbed(request):
    """300 times, calibrate on prompts drawn from a recorded table, whose mean is then the exact risk of a fresh one."""
    assets = request.config.rootpath / "tests/assets"
    model = hf.AutoModelForCausalLM.from_pretrained(assets / "pycode-5m-layerskip", dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(assets / "pycode-5m")
    text = (assets / "pycode-5m" / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    prompts = [ids[i * 2000 : i * 2000 + 24] for i in range(40)]
    offramp.attach(model, at=[3, 6])
    trace = record_texts(model, prompts, "confidence", max_new_tokens=10, every=10, limit=0.3, progress=False)
    risk, depth = trace.losses.mean(0), trace.depths.mean(0)
    draw, alpha, delta, trials = torch.Generator().manual_seed(0), 0.2, 0.1, 300
    order = [rung.threshold for rung in trace.ladder]
    broken, apart, blocks = 0, 0, []
    for _ in range(trials):
        cal = trace[torch.randint(40, (40,), generator=draw)].calibrate(alpha=alpha, delta=delta)
        at = order.index(cal.policy.threshold) if cal.certificate else None
        broken += at is not None and float(risk[at]) > alpha
        blocks.append(12.0 if at is None else float(depth[at]))
        split = torch.randperm(40, generator=draw)
        cal = trace[split[:20]].calibrate(alpha=alpha, delta=delta)
        if cal.certificate:
            apart += float(trace.losses[split[20:], order.index(cal.policy.threshold)].mean()) > alpha
    room = 3 * math.sqrt(delta * (1 - delta) / trials)
    assert broken / trials <= delta + room and apart / trials <= delta + room
    assert np.median(blocks) < 11.5  # of 12; the boldest rung whose exact risk is below alpha takes 10.2
