"""Compiled blocks under the hooks: the same answers, one compilation whatever rows are left, and an exact undo."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import offramp
from offramp import compiled
from offramp.errors import BadArgument, CompileFailed
from offramp.testing.toy import ToyModel, toy_plugin


@pytest.fixture(autouse=True)
def fresh():
    with toy_plugin(), torch.no_grad():
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ToyModel(depth=6).eval()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_the_same_answers_and_nothing_compiled_again(model, marks):
    """Six blocks share their graphs; batches of other sizes, and who enables again, find them made."""
    exits, x = offramp.attach(model, [2, 4]), torch.randn(9, 4, 8)
    top = torch.cat([offramp.record(model, x).stats["top1"]])
    policy = offramp.policy("confidence", threshold=[float(top[:, k].quantile(q)) for k, q in enumerate((0.6, 0.4))])
    keys, before, full = list(model.state_dict()), marks(model), model(x)
    with offramp.enable(model, policy) as run:
        plain, depths = model(x), run.stats.last_depths
    with offramp.enable(model, policy, compile=True) as run:
        torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
        assert torch.equal(run.stats.last_depths, depths) and len(depths.unique()) == 3
        model(x[:1])
        made = graphs()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows in (9, 1, 5, 2, 7):
                model(x[:rows])
    with torch._dynamo.config.patch(error_on_recompile=True), offramp.enable(model, policy, compile=True):
        model(x)
        assert graphs() == made == 4  # of one row and of more, where the state is a view and where it is none
    assert marks(model) == before and list(model.state_dict()) == keys and torch.equal(model(x), full)
    assert exits.at == (2, 4)


@pytest.mark.slow
def test_a_copy_compiles_its_own_and_undoes_its_own(model):
    offramp.attach(model, [3])
    x = torch.randn(3, 4, 8)
    run = offramp.enable(model, "fixed", depth=3, compile=True)
    before = model(x)
    twin = copy.deepcopy(model)
    for p in twin.blocks.parameters():
        p.zero_()
    assert not torch.allclose(twin(x), before)
    run.disable()
    assert "forward" not in model.blocks[0].__dict__ and "forward" in twin.blocks[0].__dict__


def test_half_a_file_in_the_build_cache_is_named(model, tmp_path, monkeypatch):
    """What a process leaves that was stopped while it compiled; this is what torch then says of it."""

    def load(graph, inputs):
        raise ImportError("/cache/mq/cmqvunj523.main.so: file too short")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "BACKEND", load)
    compiled.compiled.cache_clear()
    offramp.attach(model, [3])
    said = f"could not compile a block .*file too short.*remove {tmp_path} and run again"
    with offramp.enable(model, "fixed", depth=3, compile=True), pytest.raises(CompileFailed, match=said):
        model(torch.randn(2, 4, 8))
    compiled.compiled.cache_clear()


def test_a_missing_compiler_is_named_and_nothing_changes(model, marks):
    offramp.attach(model, [3])
    before = marks(model)
    missing = torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",))
    with missing, pytest.raises(BadArgument, match="needs a C[+][+] compiler on the CPU, and none was found"):
        offramp.enable(model, "fixed", depth=3, compile=True)
    assert marks(model) == before
    offramp.enable(model, "fixed", depth=3).disable()


def test_compile_takes_true_or_false(model):
    offramp.attach(model, [3])
    with pytest.raises(BadArgument, match="compile='inductor' must be True or False"):
        offramp.enable(model, "fixed", depth=3, compile="inductor")
