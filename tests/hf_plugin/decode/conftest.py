"""A small Llama whose deep blocks change little, so that early answers are sometimes right; prompts for it."""

import pytest
import torch
import transformers as hf

VOCAB = 97


def soften(model, first, scale):
    """Scale down what blocks from `first` on add to the state."""
    for block in model.model.layers[first:]:
        block.self_attn.o_proj.weight.data.mul_(scale)
        block.mlp.down_proj.weight.data.mul_(scale)
    return model.eval()


@pytest.fixture
def make():
    """Build the model; without an end token unless asked, so that lengths are known."""

    def build(scale=0.1, vocab=VOCAB, seed=1, eos=None, **sizes):
        torch.manual_seed(seed)
        given = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, **sizes}
        given |= {"num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 600}
        config = hf.LlamaConfig(vocab_size=vocab, bos_token_id=1, eos_token_id=eos, pad_token_id=0, **given)
        return soften(hf.LlamaForCausalLM(config), 2, scale)

    return build


@pytest.fixture
def model(make):
    return make()


@pytest.fixture
def one():
    return {"input_ids": torch.arange(5, 14)[None]}


@pytest.fixture
def three():
    """Three prompts of different lengths, padded on the left."""
    ids = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(3):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def marks():
    """Everything that attach and enable could leave on a model."""

    def read(model):
        return {
            f"{name}.{key}": list(value) if isinstance(value, dict) else id(value)
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
        }

    return read
