"""Recordings of blocks give what the blocks give, to the bit, and nobody's change to a block is passed by."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import offramp
from offramp_hf.backbones import _replay
from offramp_hf.backbones._replay import Example, Replay

VOCAB, NEW = 97, 40


@pytest.fixture
def model():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=VOCAB, **sizes, num_key_value_heads=2, bos_token_id=1, initializer_range=0.2)
    config.eos_token_id = None
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.arange(5, 14)[None]


def write(model, ids):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)


def proved(exits):
    return sum(graph is not None for graphs in exits.backbone.replay.proved.values() for graph in graphs)


def test_blocks_are_recorded_and_logits_are_those_of_generate(model, ids):
    wanted = write(model, ids)
    exits = offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2, verify=True):
        for _ in range(2):
            found = write(model, ids)
            assert torch.equal(found.sequences, wanted.sequences)
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-5, atol=1e-5)
    assert proved(exits) >= 4  # each block at one token
    shapes = exits.backbone.replay.graphs
    assert all(len(graphs) == 1 for graphs in shapes.values())  # equal blocks share a recording


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_cpp_where_that_is_asked_for(model, ids, monkeypatch, dtype):
    model.to(dtype)
    exits = offramp.attach(model, at=[2])
    replay, told = exits.backbone.replay, []
    for kernels, compiled in (("torch", False), ("cpp", False), ("torch", False), ("torch", True)):
        monkeypatch.setenv("OFFRAMP_KERNELS", kernels)
        with offramp.enable(model, "fixed", depth=2, verify=True, compile=compiled):
            for _ in range(2):
                found = write(model, ids)
            told.append(found)
        # the attention of this model has four, its feed-forward three
        ran = [step[0].graph for steps in replay.steps.values() for step in steps if step]
        counts = {len(graph.findAllNodes("offramp::linear")) for graph in ran}
        assert counts == {7 if compiled or kernels == "cpp" else 0}
    unit = 1e-5 if dtype == torch.float32 else 0.05
    for one in told[1:]:
        logits = [torch.stack(t.logits)[: NEW if dtype == torch.float32 else 1] for t in (one, told[0])]
        torch.testing.assert_close(*logits, rtol=unit, atol=unit)
    assert torch.equal(told[1].sequences, told[3].sequences) and torch.equal(told[0].sequences, told[2].sequences)


def test_what_is_propagated_comes_from_the_part_of_a_recording_that_stores_it(model, ids, monkeypatch):
    exits = offramp.attach(model, at=[2])
    threshold, told = middling(model, ids), []
    for uses in (10**9, _replay.USES):
        monkeypatch.setattr(_replay, "USES", uses)
        with offramp.enable(model, "confidence", threshold=threshold, kv="propagate") as run:
            for _ in range(3):
                told.append(write(model, ids))
    assert 0 < run.stats.projected < run.stats.tokens * 2
    for one in told[1:]:
        assert torch.equal(one.sequences, told[0].sequences)
        torch.testing.assert_close(torch.stack(one.logits), torch.stack(told[0].logits), rtol=1e-5, atol=1e-5)
        for mine, its in zip(one.past_key_values.layers, told[0].past_key_values.layers, strict=True):
            torch.testing.assert_close(mine.keys, its.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine.values, its.values, rtol=1e-5, atol=1e-5)
    (kept,) = exits.backbone.replay.writes.values()
    assert len(kept.graph.findAllNodes("aten::linear")) == 2  # of the seven, those of keys and of values
    assert len(kept.graph.findAllNodes("aten::scaled_dot_product_attention")) == 0


def middling(model, ids):
    """Return a confidence that some tokens reach at the exit and some do not."""
    with offramp.enable(model, "confidence", threshold=0.0, kv="propagate"):
        logits = torch.stack(write(model, ids).logits)
    return float(logits.softmax(-1).amax(-1).median())


def test_weights_that_are_more_than_numbers_multiply_themselves():
    class Packed(torch.Tensor):
        pass

    replay = Replay([nn.Linear(2, 2)])
    replay.begin(compiled=True)
    recording = torch.jit.trace(nn.functional.linear, (torch.ones(1, 2), torch.ones(2, 2)), check_trace=False)
    plain = torch.ones(2, 2)
    assert replay.quickest(recording, (plain, plain.as_subclass(Packed))) is recording
    assert replay.quickest(recording, (plain, nn.Parameter(plain))) is not recording


def test_a_hook_on_a_block_runs_at_every_token(model, ids):
    exits = offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2, verify=True):
        write(model, ids)
        assert proved(exits)
        seen = []
        handle = model.model.layers[3].mlp.register_forward_hook(lambda *_: seen.append(1))
        write(model, ids)
        handle.remove()
    assert len(seen) >= NEW - 1


def test_changed_weights_are_read_anew(model, ids):
    exits = offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2, verify=True):
        write(model, ids)
        assert proved(exits)
        model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn(32, 64) * 0.3)
        found = write(model, ids)
    assert torch.equal(found.sequences, write(model, ids).sequences)


def test_a_block_that_runs_other_code_than_before_is_found_out(model, ids):
    exits = offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2, verify=True):
        write(model, ids)
        assert proved(exits)
        model.model.layers[2].mlp.act_fn = nn.Tanh()
        found = write(model, ids)
    assert torch.equal(found.sequences, write(model, ids).sequences)


def test_adapters_switched_off_between_calls_are_off(model, ids):
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    exits = offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2, verify=True):
        on = write(tuned, ids).sequences
        assert proved(exits)
        with tuned.disable_adapter():
            off = write(tuned, ids).sequences
    assert torch.equal(on, write(tuned, ids).sequences)
    with tuned.disable_adapter():
        assert torch.equal(off, write(tuned, ids).sequences)
    assert not torch.equal(on, off)


def test_experts_chosen_by_value_are_not_recorded(ids, caplog):
    torch.manual_seed(1)
    config = hf.MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    model = hf.MixtralForCausalLM(config).eval()
    wanted = write(model, ids).sequences
    exits = offramp.attach(model, at=[1])
    with offramp.enable(model, "fixed", depth=1, verify=True):
        assert torch.equal(write(model, ids).sequences, wanted)
    assert not proved(exits) and exits.backbone.replay.refused
    assert not caplog.records  # nobody is told of a failure that is none


def test_a_copied_model_records_its_own(model, ids):
    exits = offramp.attach(model, at=[2])
    with offramp.enable(model, "fixed", depth=2, verify=True):
        write(model, ids)
    twin = copy.deepcopy(exits.backbone.replay)
    assert not twin.graphs and twin.parts[0] is not exits.backbone.replay.parts[0]


class Branches(nn.Module):
    """Runs other operations where the state is positive."""

    def forward(self, state):
        return state * 2 if state.sum() > 0 else state


class Noise(nn.Module):
    """Gives something else at every call."""

    def forward(self, state):
        return state + torch.rand(())


def feed(part, calls):
    replay, state = Replay([part]), torch.ones(1, 3)
    for _ in range(calls):
        replay.learn(0, "shape", part(state), lambda: Example(part, [state], [state]))
    return replay


def test_value_dependent_code_is_refused():
    replay = feed(Branches(), _replay.USES)
    assert replay.find(0, "shape") is None
    assert "shape" in replay.refused


def test_a_part_that_never_repeats_itself_is_given_up():
    replay = feed(Noise(), _replay.USES + _replay.TRIES)
    assert replay.find(0, "shape") is None
    assert replay.refused["shape"] == "its recordings keep differing from it"


def test_a_call_is_compared_again_in_every_generation():
    part = nn.Linear(3, 3)
    replay = feed(part, _replay.USES)
    assert replay.find(0, "shape") is not None
    replay.begin()
    assert replay.find(0, "shape") is None


def test_devices_that_run_behind_the_calls_are_left_alone():
    part, state = nn.Linear(3, 3, device="meta"), torch.ones(1, 3, device="meta")
    replay = Replay([part])
    for _ in range(_replay.USES):
        replay.learn(0, "shape", part(state), lambda: Example(part, [state], [state]))
    assert replay.off and replay.find(0, "shape") is None
