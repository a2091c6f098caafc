"""`model.generate` is unchanged by enable: every argument of it, and back to exactly what it was."""

import importlib

import pytest
import torch
import transformers as hf
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import StoppingCriteria

import offramp
from offramp.errors import UnknownName

NEW = 20


def greedy(model, batch, new=NEW, **kwargs):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **kwargs)


class Recorder:
    """A logits processor that keeps every prefix it is shown and forbids what was said three tokens ago."""

    def __init__(self):
        self.prefixes = []

    def __call__(self, ids, scores):
        self.prefixes += [tuple(row) for row in ids.tolist()]
        return scores.scatter(1, ids[:, -3:-2], -torch.inf)


class Sum(StoppingCriteria):
    """Stops a row once its newest tokens add up; knows the end token, so that rows are padded after it."""

    def __init__(self, pads):
        self.seen = []
        if pads:
            self.eos_token_id = torch.tensor([-1])

    def __call__(self, ids, scores, **kwargs):
        self.seen += [tuple(row) for row in ids.tolist()]
        return (ids[:, -2:].sum(-1) % 7 == 0) & (ids.shape[1] > 15)


#: what both sides are given; the values are made anew for each call
ARGUMENTS = {
    "plain": lambda: {},
    "repetition_penalty": lambda: {"repetition_penalty": 1.8},
    "no_repeat_ngram": lambda: {"no_repeat_ngram_size": 2},
    "min_new_tokens": lambda: {"min_new_tokens": 12, "eos_token_id": list(range(3, 60))},
    "bad_words": lambda: {"bad_words_ids": [[t] for t in range(20, 60)], "renormalize_logits": True},
    "forced_end": lambda: {"forced_eos_token_id": 7, "eos_token_id": 7},
    "processor": lambda: {"logits_processor": LogitsProcessorList([Recorder()])},
    "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([Sum(True)])},
    "criterion without end": lambda: {"stopping_criteria": StoppingCriteriaList([Sum(False)])},
    "several ends": lambda: {"eos_token_id": [4, 15, 61]},
    "scores": lambda: {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "scores with a processor": lambda: {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.5
    },
}  # fmt: skip
MODES = {"verify": {"verify": True, "draft": 4}, "adaptive": {"verify": True}}
MODES |= {"lossy": {}, "propagate": {"kv": "propagate"}, "recompute": {"kv": "recompute"}}


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def enabled(model, mode):
    """Every mode gives the full model's text: lossy ones never exit."""
    threshold = 0.06 if "verify" in MODES[mode] else 1.0
    return offramp.enable(model, "confidence", threshold=threshold, strict=True, **MODES[mode])


#: every case in two modes, and the telling ones in the others too
EVERYWHERE = ("plain", "processor", "criterion without end", "scores with a processor")
PAIRS = [(c, m) for c in ARGUMENTS for m in MODES if c in EVERYWHERE or m in ("verify", "lossy")]


@pytest.mark.parametrize("rows", ["one", "three"])
@pytest.mark.parametrize(("case", "mode"), PAIRS)
def test_arguments(model, request, rows, case, mode):
    batch = request.getfixturevalue(rows)
    wanted = greedy(model, batch, **ARGUMENTS[case]())
    offramp.attach(model, at=[2, 4])
    with enabled(model, mode) as run:
        found = greedy(model, batch, **ARGUMENTS[case]())
        assert run.stats.tokens > 0
        if mode == "verify" and case != "several ends":  # there, a text may be its first token
            assert run.stats.drafted > 0
    if torch.is_tensor(wanted):
        assert torch.equal(found, wanted)
        return
    assert type(found) is type(wanted) and torch.equal(found.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert len(mine) == len(theirs) == NEW
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert a.dtype == b.dtype and not a.is_inference()


@pytest.mark.parametrize("rows", ["one", "three"])
def test_processors_see_true_prefixes(model, request, rows, mode):
    """Every prefix of the text is shown, in order, and besides them only prefixes that end in drafts."""
    batch = request.getfixturevalue(rows)
    offramp.attach(model, at=[2, 4])
    recorder, criterion = Recorder(), Sum(True)
    with enabled(model, mode):
        text = greedy(
            model,
            batch,
            logits_processor=LogitsProcessorList([recorder]),
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
    prompt = batch["input_ids"].shape[1]
    for row in text.tolist():
        end = max(len(p) for p in criterion.seen if list(p) == row[: len(p)])
        true = [tuple(row[:n]) for n in range(prompt, end)]
        assert [p for p in dict.fromkeys(recorder.prefixes) if p in set(true)] == true
        assert [p for p in dict.fromkeys(criterion.seen) if list(p) == row[: len(p)]] == [*true[1:], tuple(row[:end])]
    whole = {tuple(row[:n]) for row in text.tolist() for n in range(prompt, text.shape[1])}
    if "verify" in MODES[mode]:
        assert all(any(p[:n] in whole for n in range(prompt, len(p) + 1)) for p in recorder.prefixes)
    else:
        assert set(recorder.prefixes) <= whole


@pytest.mark.parametrize("new", [0, 1, 2])
def test_short_outputs(model, one, three, new, mode):
    def outcome(batch):
        try:
            return greedy(model, batch, new=new).tolist()
        except ValueError as error:
            return str(error)

    wanted = [outcome(one), outcome(three)]
    offramp.attach(model, at=[2])
    with enabled(model, mode):
        assert [outcome(one), outcome(three)] == wanted


def test_a_prompt_of_one_token(model, mode):
    batch = {"input_ids": torch.tensor([[5]])}
    wanted = greedy(model, batch)
    offramp.attach(model, at=[2])
    with enabled(model, mode):
        assert torch.equal(greedy(model, batch), wanted)


def test_positional_arguments(model, one, mode):
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    wanted = model.generate(one["input_ids"], config, LogitsProcessorList([Recorder()]))
    offramp.attach(model, at=[2])
    with enabled(model, mode):
        assert torch.equal(model.generate(one["input_ids"], config, LogitsProcessorList([Recorder()])), wanted)
        with pytest.raises(TypeError, match="generation_config"):
            model.generate(one["input_ids"], config, generation_config=config)


def test_several_samples_per_prompt(model, three, mode):
    offramp.attach(model, at=[2])
    with enabled(model, mode) as run:
        out = model.generate(**three, do_sample=True, num_return_sequences=2, max_new_tokens=6)
        assert out.shape == (6, 17) and run.stats.tokens == 36
        assert torch.equal(out[::2, :11], three["input_ids"])


class Words:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.pieces, self.ends = [], 0

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("rows", ["one", "three"])
@pytest.mark.parametrize("ends", [None, [4, 15, 61]])
def test_streamers(model, request, rows, ends, mode):
    """The same pieces in the same order, and one end."""
    batch, streams = request.getfixturevalue(rows), []
    offramp.attach(model, at=[2, 4])
    for early in (False, True):
        streams.append(Words())
        if early:
            with enabled(model, mode):
                greedy(model, batch, streamer=streams[-1], eos_token_id=ends)
        else:
            greedy(model, batch, streamer=streams[-1], eos_token_id=ends)
    assert streams[0].pieces == streams[1].pieces and streams[0].ends == streams[1].ends == 1


@pytest.fixture(scope="module")
def pycode():
    folder = "tests/assets/pycode-5m"
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, hf.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("how", ["argument", "config", "own criterion too"])
def test_stop_strings(root, pycode, how, mode):
    model, tokenizer = pycode
    batch = tokenizer("def add(a, b):\n    ", return_tensors="pt")
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}

    def call():
        given = {"stop_strings": ["return", "\n\n"], "tokenizer": tokenizer}
        if how == "config":
            given["generation_config"] = GenerationConfig(
                stop_strings=given.pop("stop_strings"), max_new_tokens=40, do_sample=False
            )
            return model.generate(**batch, **given)
        if how == "own criterion too":
            given["stopping_criteria"] = StoppingCriteriaList([Sum(True)])
        return greedy(model, batch, new=40, **given)

    wanted = call()
    assert wanted.shape[1] < batch["input_ids"].shape[1] + 40
    with offramp.attach(model, at=[4]), enabled(model, mode) as run:
        assert torch.equal(call(), wanted)
        assert run.stats.tokens
        with pytest.raises(ValueError, match="tokenizer"):
            greedy(model, batch, stop_strings=["return"])


@pytest.mark.parametrize("rows", ["one", "three"])
def test_a_text_can_be_continued(model, request, rows, mode):
    """The returned cache holds all but the newest token, each in its own slot, and takes the text further."""
    batch = request.getfixturevalue(rows)
    whole, first = greedy(model, batch, new=2 * NEW), greedy(model, batch, return_dict_in_generate=True)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    longer = torch.cat([mask, mask.new_ones(len(mask), NEW)], 1)
    offramp.attach(model, at=[2, 4])
    with enabled(model, mode):
        out = greedy(model, batch, return_dict_in_generate=True)
        cache = out.past_key_values
        assert type(cache) is type(first.past_key_values)
        for mine, theirs in zip(cache.layers, first.past_key_values.layers, strict=True):
            assert type(mine) is type(theirs) and mine.get_seq_length() == theirs.get_seq_length()
            for row in range(len(mask)):
                seen = longer[row, :-1].bool()
                torch.testing.assert_close(mine.keys[row][:, seen], theirs.keys[row][:, seen], rtol=1e-4, atol=1e-5)
        again = {"input_ids": out.sequences, "attention_mask": longer, "past_key_values": cache}
        assert torch.equal(greedy(model, again), whole)
        assert cache.get_seq_length() == whole.shape[1] - 1  # the user's own cache grew with the text
        # only the newest token of it, with the cache: as the framework allows
        new = {"input_ids": whole[:, -1:], "past_key_values": cache}
        new["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 2 * NEW)], 1)
        tail = greedy(model, new)
    assert torch.equal(tail[:, 1:], greedy(model, batch, new=3 * NEW)[:, -NEW:])


def test_the_cache_of_a_text_that_ended(model, one, mode):
    """An end token in the middle of a draft: nothing behind it is in the cache."""
    end = int(greedy(model, one)[0, 14])
    offramp.attach(model, at=[2])
    with enabled(model, mode):
        out = greedy(model, one, eos_token_id=end, return_dict_in_generate=True)
    assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {out.sequences.shape[1] - 1}


def test_per_call_policy(model, one):
    wanted = greedy(model, one)
    offramp.attach(model, at=[2])
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    with offramp.enable(model, "fixed", depth=2) as run:
        lossy = model.generate(**one, generation_config=config)
        assert not torch.equal(lossy, wanted) and run.stats.exits[2] == NEW - 1
        tokens = run.stats.tokens
        config.early_exit = {"policy": "never"}
        assert torch.equal(model.generate(**one, generation_config=config), wanted) and run.stats.tokens == tokens
        config.early_exit = {"policy": "fixed", "depth": 2, "verify": True, "draft": 3}
        assert torch.equal(model.generate(**one, generation_config=config), wanted) and run.stats.drafted > 0
        config.early_exit = {"policy": "confidnce"}
        with pytest.raises(UnknownName, match="did you mean 'confidence'"):
            model.generate(**one, generation_config=config)
        assert torch.equal(greedy(model, one), lossy)


@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_flag_travels_with_the_model(model, one, tmp_path, where):
    wanted = greedy(model, one)
    with offramp.attach(model, at=[2]) as exits:
        exits.save(tmp_path / "exits")
    flag = {"policy": "confidence", "threshold": 0.0, "verify": True, "draft": 3, "exits": str(tmp_path / "exits")}
    getattr(model, where).early_exit = flag
    model.generation_config._from_model_config = False  # else the framework makes it anew, without the flag, on loading
    model.save_pretrained(tmp_path / "model")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    keys = list(loaded.state_dict())
    with offramp.enable(loaded) as run:
        assert torch.equal(greedy(loaded, one), wanted) and run.stats.drafted > 0
    assert list(loaded.state_dict()) == keys and torch.equal(greedy(loaded, one), wanted)
    auto = importlib.import_module("offramp.auto")
    auto.on()
    try:
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        run = loaded.__dict__["_offramp_run"]
        assert torch.equal(greedy(loaded, one), wanted) and run.stats.drafted > 0
    finally:
        auto.off()
