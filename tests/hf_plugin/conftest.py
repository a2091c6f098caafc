"""A small random Llama in a directory, with a real tokenizer, fitted-like exits and text."""

import shutil
from pathlib import Path

import pytest
import torch

import offramp

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`model`: 4 blocks, width 32; `exits`: tied heads at 1, 2 and 3; `text.txt`; `prompts.jsonl`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "pycode-5m")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, pad_token_id=0, eos_token_id=None, bos_token_id=1)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    with offramp.attach(model, [1, 2, 3]) as exits:
        exits.save(root / "exits")
    shutil.copy(ASSETS / "pycode-5m" / "heldout.txt", root / "text.txt")
    (root / "prompts.jsonl").write_text('"def f(x):"\n\n{"prompt": "import os"}\n"class A:"\n"for i in"\n')
    return root
