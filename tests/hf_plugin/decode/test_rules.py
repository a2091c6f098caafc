"""Every draft rule on every kind of decoder: the framework's own tokens, for one row and padded rows, with logits
processors and stop strings.
"""

import functools
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import LogitsProcessorList

import offramp
from offramp._plugins import adapt
from offramp.errors import BadArgument
from offramp_hf.backbones import _replay

DEPTH, VOCAB, NEW = 6, 97, 14
IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
BASE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4, **IDS}
BASE |= {"initializer_range": 0.2}
WIDE = {**BASE, "intermediate_size": 64, "max_position_embeddings": 128}
GROUPED = {**WIDE, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 120}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 128, **IDS}
MPT = {"vocab_size": VOCAB, "d_model": 32, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 128, **IDS}
OPT = {**BASE, "ffn_dim": 64, "max_position_embeddings": 128, "init_std": 0.2, "word_embed_proj_dim": 32}
MOE = {**GROUPED, "num_local_experts": 4, "sliding_window": None}
FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=120)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA, sliding_window_pattern=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, initializer_range=0.2)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**WIDE)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDE)),
    "falcon-alibi": lambda: hf.FalconForCausalLM(hf.FalconConfig(**BASE, alibi=True)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(**MPT, initializer_range=0.2, use_cache=True)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MOE)),
}
#: models whose blocks are run from recordings
RECORDED = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi", "gpt_neox", "olmo2"}
#: models that count positions from the cache or the mask, so that nodes of a tree cannot be placed
NO_TREES = {"falcon-alibi", "mpt"}
OUT = ("o_proj.weight", "out_proj.weight", "down_proj", "c_proj.weight", "dense.weight", "4h_to_h.weight", "fc2.weight")
RULES = offramp.names(offramp.DraftRule)


@functools.cache
def family(name):
    """A model whose deep blocks change little, so that early answers are sometimes right."""
    torch.manual_seed(1)
    model = FAMILIES[name]().eval()
    for block in adapt(model).blocks[2:]:
        for key, weight in block.named_parameters():
            if key.endswith(OUT):
                weight.data.mul_(0.1)
    return model


@functools.cache
def words():
    """A real tokenizer; its first tokens are single characters."""
    return hf.AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "assets" / "pycode-5m")


def batches():
    # long enough that what is generated stood somewhere before
    ids = torch.randint(3, VOCAB, (4, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(4):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids[:1]}, {"input_ids": ids * mask, "attention_mask": mask}


def dull(ids, scores):
    """A logits processor that looks at the whole text: it holds words back that were just said."""
    return scores.scatter_add(1, ids[:, -4:], torch.full((len(ids), min(4, ids.shape[1])), -1.0))


def calls(model, stop):
    """Return the six texts: one row and four padded, plain, with a processor, with stop strings."""
    for batch in batches():
        for more in (
            {},
            {"logits_processor": LogitsProcessorList([dull])},
            {"stop_strings": stop, "tokenizer": words()},
        ):
            yield model.generate(**batch, max_new_tokens=NEW, do_sample=False, **more)


@functools.cache
def wanted(name):
    """What the framework says, and a stop string that ends its text early."""
    model = family(name)
    made = model.generate(**batches()[0], max_new_tokens=NEW, do_sample=False)
    stop = [words().decode(made[0, -NEW // 2])]
    return stop, list(calls(model, stop))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rule", RULES)
def test_the_frameworks_own_tokens(name, rule):
    model, (stop, texts) = family(name), wanted(name)
    with offramp.attach(model, at=[1, 3], head="tied"):
        if rule == "tree" and name in NO_TREES:
            with pytest.raises(BadArgument, match="'tree' verifies many continuations.*draft='confident'"):
                offramp.enable(model, "fixed", depth=1, verify=True, draft=rule)
            return
        with offramp.enable(model, "fixed", depth=1, verify=True, draft=rule, strict=True) as run:
            for found, text in zip(calls(model, stop), texts, strict=True):
                assert torch.equal(found, text)
            if rule == "none":
                assert run.stats.drafted == 0 and run.stats.blocks_run == run.stats.blocks_full
            else:
                assert run.stats.drafted > run.stats.accepted >= 0 and run.stats.rounds < run.stats.tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_the_frameworks_own_tokens_with_products_in_cpp(name, monkeypatch):
    monkeypatch.setenv("OFFRAMP_KERNELS", "cpp")
    monkeypatch.setattr(_replay, "USES", 2)  # so that these short texts come from recordings
    model, (stop, texts) = family(name), wanted(name)
    with offramp.attach(model, at=[1, 3], head="tied") as exits:
        for rule in ("confident", "del", "hybrid", "none", *(() if name in NO_TREES else ("tree",))):
            with offramp.enable(model, "fixed", depth=1, verify=True, draft=rule, strict=True):
                for found, text in zip(calls(model, stop), texts, strict=True):
                    assert torch.equal(found, text)
        replay = exits.backbone.replay
        kinds = {node.kind() for graph in replay.quick.values() for node in graph.graph.nodes()}
        assert ("offramp::linear" in kinds) == (name in RECORDED)


@pytest.mark.parametrize("head", ["adapter", "layer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_that_read_earlier_states(name, head):
    model, (stop, texts) = family(name), wanted(name)
    with offramp.attach(model, at=[1, 3], head=head) as exits:
        for depth in exits if head == "adapter" else ():
            torch.nn.init.normal_(exits[depth].out.weight, std=0.05)
        for rule in ("confident", "dssd", *(() if name in NO_TREES else ("tree",))):
            with offramp.enable(model, "confidence", threshold=0.02, verify=True, draft=rule, strict=True) as run:
                for found, text in zip(calls(model, stop), texts, strict=True):
                    assert torch.equal(found, text)
                assert run.stats.drafted > 0
