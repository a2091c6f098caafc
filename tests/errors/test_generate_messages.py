"""What generate cannot do early: one warning that names the reason and the framework's own text, or an error if
strict.
"""

import warnings

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, LogitsProcessorList, QuantizedCache, StaticCache
from transformers.generation import SynthIDTextWatermarkingConfig

import offramp
from offramp.errors import BadArgument, OfframpError

NEW, VOCAB = 12, 97
ONE = {"input_ids": torch.arange(5, 14)[None]}
TWO = {"input_ids": torch.arange(5, 23).view(2, 9)}
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def llama(**config):
    given = {"initializer_range": 0.2, "max_position_embeddings": 64, **config}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **given)).eval()


def mistral():
    return hf.MistralForCausalLM(
        hf.MistralConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2, sliding_window=16)
    ).eval()


def longrope():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    given = {"initializer_range": 0.2, "original_max_position_embeddings": 12, "rope_parameters": rope}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, **given)).eval()


def dynamic():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return llama(max_position_embeddings=12, rope_parameters=rope)


class QuantizedLike(DynamicCache):
    """Stands for caches whose layers cannot be cut back."""


#: what is asked -> (model, batch, arguments of generate, part of the reason)
CASES = {
    "beams": (llama, ONE, lambda m: {"num_beams": 2}, "beam search"),
    "static cache": (llama, ONE, lambda m: {"cache_implementation": "static"}, "cache_implementation='static'"),
    "a static cache": (
        llama,
        ONE,
        lambda m: {"past_key_values": StaticCache(config=m.config, max_cache_len=40)},
        "a StaticCache (only DynamicCache",
    ),
    "a cache of its own": (
        llama,
        ONE,
        lambda m: {"past_key_values": QuantizedLike(config=m.config)},
        "a QuantizedLike (only DynamicCache",
    ),
    "no cache": (llama, ONE, lambda m: {"use_cache": False}, "use_cache=False"),
    "window passed": (mistral, ONE, lambda m: {}, "sliding attention whose window of 16 tokens is passed (21 tokens)"),
    "longrope": (longrope, ONE, lambda m: {}, "longrope rotary scaling past 12 tokens (21)"),
    "dynamic rope": (dynamic, ONE, lambda m: {}, "dynamic rotary scaling past 12 tokens (21)"),
    "assistant": (llama, ONE, lambda m: {"assistant_model": llama()}, "assistant_model="),
    "assistant_early_exit": (llama, ONE, lambda m: {"assistant_early_exit": 2}, "assisted generation"),
    "prompt lookup": (llama, ONE, lambda m: {"prompt_lookup_num_tokens": 2}, "assisted generation"),
    "attentions": (
        llama,
        ONE,
        lambda m: {"output_attentions": True, "return_dict_in_generate": True},
        "output_attentions or output_hidden_states",
    ),
    "hidden states": (
        llama,
        ONE,
        lambda m: {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_attentions or output_hidden_states",
    ),
    "guidance": (llama, ONE, lambda m: {"guidance_scale": 1.5}, "guidance_scale"),
    "embeddings": (
        llama,
        {},
        lambda m: {"inputs_embeds": m.get_input_embeddings()(ONE["input_ids"]).detach()},
        "inputs_embeds=",
    ),
    "own loop": (llama, ONE, lambda m: {"custom_generate": own_loop}, "custom_generate="),
    "positions": (llama, ONE, lambda m: {"position_ids": torch.arange(9)[None] * 2}, "position_ids that do not count"),
    "allowed tokens": (
        llama,
        TWO,
        lambda m: {"prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 7, 9]},
        "prefix_allowed_tokens_fn with more than one row",
    ),
    "watermark": (
        llama,
        ONE,
        lambda m: {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3), "seeded": True},
        "a watermark whose processor remembers every call",
    ),
}


def own_loop(model, input_ids, **kwargs):
    return torch.cat([input_ids, input_ids], 1)


def generate(model, batch, arguments, **more):
    arguments = dict(arguments)
    if arguments.pop("seeded", False):
        torch.manual_seed(0)
        arguments["do_sample"] = True
    return model.generate(**batch, **{"do_sample": False, "max_new_tokens": NEW, **arguments, **more})


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return type(a) is type(b) and torch.equal(a.sequences, b.sequences) and a.keys() == b.keys()


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_full_model_generates_and_one_warning_says_why(case, verify):
    build, batch, arguments, reason = CASES[case]
    model = build()
    wanted = generate(model, batch, arguments(model))
    offramp.attach(model, at=[2])
    policy = {"threshold": 0.0, "verify": verify}
    with offramp.enable(model, "confidence", **policy) as run:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            assert same(generate(model, batch, arguments(model)), wanted)
            assert same(generate(model, batch, arguments(model)), wanted)
        mine = [w for w in heard if "early exit is off for this call" in str(w.message)]
        assert len(mine) == 1 and reason in str(mine[0].message) and mine[0].category is UserWarning
        assert mine[0].filename == __file__  # the warning points at the user's line
        assert run.stats.tokens == 0
    plain = {"max_new_tokens": 3, "do_sample": False}
    before = model.generate(**ONE, **plain)
    with offramp.enable(model, "confidence", **policy, strict=True) as run:
        with pytest.raises(
            OfframpError, match="cannot be decoded early, and strict=True forbids the full model"
        ) as error:
            generate(model, batch, arguments(model))
        assert reason in str(error.value)
        made = model.generate(**ONE, **plain)
        assert run.stats.tokens == 3 and (not verify or torch.equal(made, before))
    assert torch.equal(model.generate(**ONE, **plain), before)


def test_the_streamer_of_a_full_call_is_closed():
    class Words(list):
        def put(self, value):
            self.extend(value.flatten().tolist())

        def end(self):
            self.append("end")

    model = mistral()
    wanted = generate(model, ONE, {})[0].tolist()
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.0), pytest.warns(UserWarning, match="sliding attention"):
        words = Words()
        generate(model, ONE, {"streamer": words})
    assert words == [*wanted, "end"]


def test_a_quantised_cache():
    """Whatever library it needs, the class is refused by its name."""
    from offramp_hf.cache import why_not

    assert "a QuantizedCache" in why_not(QuantizedCache.__new__(QuantizedCache), 4, 10)
    assert why_not(DynamicCache(), 4, 10) is None
    three = DynamicCache()
    for i in range(3):
        three.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), i)
    assert why_not(three, 4, 10) == "a cache of 3 layers for 4 blocks"


def test_a_mask_of_four_dimensions():
    from offramp_hf._compat import why_not_call

    reason = why_not_call(None, [], {"attention_mask": torch.ones(1, 1, 9, 9)}, ONE["input_ids"])
    assert reason == "an attention_mask of 4 dimensions"


def test_other_inputs_of_a_model():
    from offramp_hf._compat import why_not_call

    assert why_not_call(None, [], {"pixel_values": torch.ones(1)}, ONE["input_ids"]) == "model input pixel_values"
    assert why_not_call(None, [], {}, torch.zeros(1, 0)) == "an empty prompt or batch"


def test_an_empty_batch_is_the_frameworks_business():
    model = llama()
    empty = {"input_ids": torch.zeros(0, 9).long()}

    def outcome():
        try:
            return generate(model, empty, {}).shape
        except (RuntimeError, ValueError, IndexError) as error:
            return type(error)

    wanted = outcome()
    offramp.attach(model, at=[2])
    with warnings.catch_warnings(), offramp.enable(model, "confidence", threshold=0.0):
        warnings.simplefilter("ignore")
        assert outcome() == wanted


@pytest.mark.parametrize("draft", [0, -1, 1.5, True])
def test_draft_is_positive(draft):
    model = llama()
    offramp.attach(model, at=[2])
    with pytest.raises(BadArgument, match="draft=.* must be a positive number of tokens, or None to adapt"):
        offramp.enable(model, "confidence", threshold=0.5, verify=True, draft=draft)
    assert "generate" not in model.__dict__ and "_offramp_run" not in model.__dict__


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        ("kangaroo", "no DraftRule is called 'kangaroo'.*Known: adaptive, confident"),
        ({"rule": "fixed", "lenght": 3}, "no option 'lenght'.*did you mean 'length'"),
        ({"length": 3}, "is no draft rule; give a name of offramp.names"),
        ([3], "is no draft rule; give a name of offramp.names"),
        ({"rule": "confident", "eta": 2}, "eta=2 must be a number from 0 to 1"),
        ({"rule": "tree", "width": 0}, "width=0 must be a whole number >= 1"),
        ({"rule": "lookup", "ngram": 1, "least": 2}, "least=2 is more than ngram=1"),
        ({"rule": "thompson", "a": 0}, "a=0 must be above 0"),
        ("del", "needs 2 of them, the model has 1 .at .2.*offramp.attach"),
    ],
)
def test_a_wrong_rule_changes_nothing(draft, says):
    model = llama()
    offramp.attach(model, at=[2])
    with pytest.raises(BadArgument, match=says):
        offramp.enable(model, "confidence", threshold=0.5, verify=True, draft=draft)
    assert "generate" not in model.__dict__ and "_offramp_run" not in model.__dict__


def test_rules_that_do_not_fit_the_heads():
    model = llama()
    offramp.attach(model, at=[2, 3], head="adapter")
    with pytest.raises(BadArgument, match="'del' compares what all exits say.*head='translator'"):
        offramp.enable(model, "confidence", threshold=0.5, verify=True, draft="del")


def test_a_rule_without_verify():
    model = llama()
    offramp.attach(model, at=[2])
    with pytest.raises(BadArgument, match="draft='fixed' is for verify=True.*or add verify=True"):
        offramp.enable(model, "confidence", threshold=0.5, draft="fixed")
    assert "generate" not in model.__dict__


def test_unknown_kv():
    model = llama()
    offramp.attach(model, at=[2])
    with pytest.raises(BadArgument, match="kv='hole' is not known; choose one of catch_up, propagate"):
        offramp.enable(model, "confidence", threshold=0.5, kv="hole")
    assert "generate" not in model.__dict__


def test_a_processor_that_knows_its_place_in_the_batch():
    """Rows of a verified batch are shown one by one; a processor for whole batches is told so, and nothing is left."""
    model = llama()
    bias = torch.zeros(2, VOCAB)
    biased = {"logits_processor": LogitsProcessorList([lambda ids, scores: scores + bias])}
    wanted = generate(model, TWO, biased)
    offramp.attach(model, at=[2])
    with offramp.enable(model, "confidence", threshold=0.0, verify=True, draft=2):
        with pytest.raises(BadArgument, match=r"answered \[1, 97\] scores with \[2, 97\].*use verify=False"):
            generate(model, TWO, biased)
        assert torch.equal(generate(model, TWO, {}), wanted)
    with offramp.enable(model, "confidence", threshold=1.0):
        assert torch.equal(generate(model, TWO, biased), wanted)
