"""compile=True while decoding: the same tokens, code that is made once, and nothing of it left behind."""

import pytest
import torch
import transformers as hf
from torch._dynamo.utils import counters

import offramp
from offramp import compiled
from offramp._plugins import adapt
from offramp.errors import BadArgument
from offramp.kernels.cpp import _build
from offramp_hf.cache import GrowingLayer, WindowCache
from offramp_hf.decode import compiled as way
from offramp_hf.decode.compiled import Compiled
from offramp_hf.decode.direct import TABLE, Direct
from offramp_hf.decode.place import Place


@pytest.fixture
def fresh(monkeypatch):
    """What is traced, and how often, is the same whatever makes code of it: here nothing does, in seconds."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    compiled.compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    compiled.compiled.cache_clear()
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def write(model, one, **options):
    with offramp.enable(model, "confidence", threshold=0.02, **options) as run:
        return model.generate(**one, max_new_tokens=24, do_sample=False), run.stats


def test_on_the_cpu_recordings_multiply_in_cpp_and_the_text_is_the_same(model, one, marks):
    """They are faster than compiled blocks there."""
    exits = offramp.attach(model, [2, 4])
    wanted, before = model.generate(**one, max_new_tokens=24, do_sample=False), marks(model)
    found, stats = write(model, one, verify=True, draft=3, compile=True)
    assert torch.equal(found, wanted) and stats.accepted and exits.backbone.replay.cpp
    assert torch.equal(write(model, one, compile=True)[0], write(model, one)[0])
    assert not exits.backbone.replay.cpp and marks(model) == before


def test_a_missing_compiler_is_refused(model, marks, monkeypatch):
    offramp.attach(model, [2, 4])
    before = marks(model)
    monkeypatch.setenv("CXX", "no-such-compiler")
    _build.load.cache_clear()
    with pytest.raises(BadArgument, match="multiplies in C[+][+] on a CPU, and there is no .* or leave compile out"):
        offramp.enable(model, "confidence", threshold=0.5, verify=True, compile=True)
    _build.load.cache_clear()
    assert marks(model) == before


def test_blocks_that_run_inside_the_model_alone_are_refused(make, marks):
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=4, num_heads=4, pad_token_id=0,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config).eval()
    offramp.attach(model, [2])
    before = marks(model)
    with pytest.raises(BadArgument, match="T5ForConditionalGeneration run inside its own forward; leave compile out"):
        offramp.enable(model, "confidence", threshold=0.5, compile=True)
    assert marks(model) == before


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_blocks_share_their_code_and_nothing_is_compiled_again(model, one, marks, monkeypatch):
    """Two pieces of code for six blocks; other lengths, windows, texts and who enables again find them made."""
    assert offramp.attach(model, [2, 4]).backbone.direct_fits
    wanted, before = model.generate(**one, max_new_tokens=24, do_sample=False), marks(model)
    monkeypatch.setattr(way, "single", lambda decoder: Compiled)
    monkeypatch.setattr(Direct, "watched", lambda *a: pytest.fail("a block ran that was not compiled"))
    found, stats = write(model, one, verify=True, draft=3)
    assert torch.equal(found, wanted) and stats.drafted > stats.rounds > 0
    made = graphs()
    assert 2 <= made <= 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(write(model, one, verify=True, draft=5)[0], wanted)
        write(model, {"input_ids": torch.arange(9, 40)[None]}, verify=True, draft=2)
        write(model, one)
    assert graphs() == made
    assert marks(model) == before
    assert torch.equal(model.generate(**one, max_new_tokens=24, do_sample=False), wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_states_are_those_of_the_blocks(model):
    """Across the end of a table of positions, and after calls that are too long to be worth it."""
    backbone = adapt(model)
    runners = [kind(backbone, WindowCache([GrowingLayer() for _ in range(6)])) for kind in (Direct, Compiled)]
    pieces, at = [TABLE - 20, 20, 1], 0
    ids = torch.randint(3, 97, (1, sum(pieces)))
    for n in pieces:
        found = []
        for run in runners:
            with run.running():
                low = run.window(ids[:, at : at + n], 0, 2, None, Place(None))
                found.append(run.window(ids[:, at : at + n], 2, 6, low, Place(None)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        at += n
    for a, b in zip(*(run.cache.layers for run in runners), strict=True):
        assert a.length == b.length == sum(pieces)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
