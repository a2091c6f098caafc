"""Running the blocks straight gives the states of the model's own forward, also across the ends of its tables."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp._plugins import adapt
from offramp_hf.cache import GrowingLayer, WindowCache
from offramp_hf.decode.direct import TABLE, Direct
from offramp_hf.decode.direct_rows import DirectRows
from offramp_hf.decode.place import Place
from offramp_hf.decode.runner import Through


def pair(model):
    backbone = adapt(model)
    caches = [WindowCache([GrowingLayer() for _ in range(6)]) for _ in range(2)]
    return Direct(backbone, caches[0]), Through(backbone, caches[1], {})


@pytest.mark.parametrize("pieces", [[3, 1, 1, 4], [250, 3, 6, 1], [255, 1, 1], [TABLE - 2, 7], [TABLE + 3, TABLE, 1]])
def test_straight_equals_through(model, pieces):
    direct, through = pair(model)
    ids, at = torch.randint(3, 97, (1, sum(pieces))), 0
    with torch.no_grad():
        for n in pieces:
            tokens = ids[:, at : at + n]
            both, place = (direct, through), Place(None)
            low = [run.window(tokens, 0, 2, None, place) for run in both]
            high = [run.window(tokens, 2, 6, state, place) for run, state in zip(both, low, strict=True)]
            torch.testing.assert_close(*low, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(*high, rtol=1e-4, atol=1e-5)
            at += n
    for a, b in zip(direct.cache.layers, through.cache.layers, strict=True):
        assert a.length == b.length == sum(pieces)
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[6, 1, 1, 4], [250, 3, 6, 1], [255, 1, 1], [TABLE + 3, TABLE, 1]])
def test_rows_straight_equal_through(model, pieces):
    """Three rows, one padded, one with a hole where a draft was rejected."""
    backbone = adapt(model)
    rows = DirectRows(backbone, WindowCache([GrowingLayer() for _ in range(6)]))
    through = Through(backbone, WindowCache([GrowingLayer() for _ in range(6)]), {})
    ids, mask, at = torch.randint(3, 97, (3, sum(pieces))), torch.ones(3, sum(pieces), dtype=torch.long), 0
    mask[1, :3], mask[2, pieces[0] - 1] = 0, 0
    for n in pieces:
        tokens, place = ids[:, at : at + n], Place(mask[:, : at + n], sum(pieces))
        found = []
        for run in (rows, through):
            with run.running():
                low = run.window(tokens, 0, 2, None, place)
                found.append(run.window(tokens, 2, 6, low, place))
        real = mask[:, at : at + n].bool()
        torch.testing.assert_close(found[0][real], found[1][real], rtol=1e-4, atol=1e-5)
        at += n


@pytest.mark.parametrize("before", [3, 255, 256])
def test_filling_stores_without_running(model, before):
    """Only norm, keys and values of the deep blocks run; both runners store the same."""
    direct, through = pair(model)
    ran = []
    for block in model.model.layers[2:]:
        block.mlp.register_forward_hook(lambda *_: ran.append(1))
    ids = torch.randint(3, 97, (1, before + 1))
    with torch.no_grad():
        for run in (direct, through):
            state = run.window(ids[:, :before], 0, 2, None, Place(None))
            run.window(ids[:, :before], 2, 6, state, Place(None))
            state = run.window(ids[:, before:], 0, 2, None, Place(None))
            ran.clear()
            run.fill(ids[:, before:], 2, state, Place(None))
            assert not ran and not run.cache.only_store
    for a, b in zip(direct.cache.layers, through.cache.layers, strict=True):
        assert a.length == b.length == before + 1
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)


def test_frozen_rows_keep_their_state(model):
    """A row that has stopped hands the same state on, and its keys come from that state."""
    backbone = adapt(model)
    cache = WindowCache([GrowingLayer() for _ in range(6)])
    run = Through(backbone, cache, {})
    ids = torch.randint(3, 97, (2, 1))
    with torch.no_grad():
        state = run.window(ids, 0, 2, None, Place(None))
        rows = torch.tensor([True, False])
        out = run.window(ids, 2, 6, state, Place(None), (rows, state))
        assert torch.equal(out[0], state[0]) and not torch.equal(out[1], state[1])
        for i in (2, 5):
            block = model.model.layers[i]
            value = block.self_attn.v_proj(block.input_layernorm(state[0]))
            torch.testing.assert_close(cache.layers[i].values[0].transpose(0, 1).flatten(1), value)


def test_positions_of_padded_rows():
    """Each row counts its own tokens; drafts past the last place are clamped, for nobody reads them."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    place = Place(mask, longest=6)
    assert place.positions(3, 2, mask.device).tolist() == [[3, 4], [1, 2]]
    assert Place(mask, longest=4).positions(3, 2, mask.device).tolist() == [[3, 3], [1, 2]]
    assert Place(None).positions(3, 2, mask.device).tolist() == [[3, 4]]


@pytest.mark.parametrize("scale", [1, 64])
def test_rounding_to_16_bits_is_told_from_a_fault_by_the_spread_of_the_logits(scale, monkeypatch):
    """As deep and wide models round, whatever the size of their logits; a missing mask is no rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    window = Direct.window

    def rounding(self, *args):
        state = window(self, *args)
        return state + 0.01 * state.std() * torch.randn(state.shape).to(state)

    monkeypatch.setattr(Direct, "window", rounding)
    assert adapt(model).direct_fits
    monkeypatch.setattr(Direct, "window", window)
    monkeypatch.setattr(Direct, "mask", lambda self, new, slots, like: like.new_zeros(1, 1, new, slots + new))
    assert not adapt(model).direct_fits
