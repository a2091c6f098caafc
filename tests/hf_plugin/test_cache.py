"""Cache layers that grow in place: the same contents as the framework's, whatever is appended, cropped and moved."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from offramp_hf.cache import CHUNK, GrowingLayer, Stored, WindowCache, borrowed, causal, why_not


def states(n, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, n, 4, dtype=dtype), torch.randn(batch, 3, n, 4, dtype=dtype)


@pytest.mark.parametrize("sizes", [[1], [5, 1, 1], [CHUNK], [CHUNK - 1, 1, 1], [CHUNK + 3, 2 * CHUNK, 1]])
def test_appends_as_the_framework_does(sizes):
    mine, theirs = GrowingLayer(), DynamicLayer()
    for n in sizes:
        for found, wanted in zip(mine.update(*(s := states(n))), theirs.update(*s), strict=True):
            assert torch.equal(found, wanted)
        assert mine.get_seq_length() == theirs.get_seq_length() == mine.length
        assert mine.get_mask_sizes(2) == theirs.get_mask_sizes(2)
    mine.crop(-1)
    theirs.crop(-1)
    new = states(4)
    assert torch.equal(mine.update(*new)[0], theirs.update(*new)[0])


def test_appending_and_cropping_copy_nothing_old():
    layer = GrowingLayer()
    layer.update(*states(10))
    place = layer.buffers[0].data_ptr()
    for _ in range(20):
        layer.update(*states(3))
        layer.crop_to(layer.length - 2)
    assert layer.length == 30 and layer.keys.data_ptr() == place == layer.buffers[0].data_ptr()
    layer.crop_to(100)
    assert layer.length == 30, "cropping never makes a layer longer"
    layer.update(*states(CHUNK))
    assert layer.keys.data_ptr() != place and layer.buffers[0].shape[-2] == 2 * CHUNK


def test_gather_moves_slots_per_row():
    layer = GrowingLayer()
    keys, values = states(6)
    layer.update(keys, values)
    layer.gather(torch.tensor([[0, 0, 0, 1, 2], [1, 2, 3, 4, 5]]))
    assert torch.equal(layer.keys[0], keys[0][:, [0, 0, 0, 1, 2]]) and torch.equal(layer.values[1], values[1][:, 1:])
    assert layer.length == 5


def cache(length=5, layers=3):
    made = DynamicCache()
    for i in range(layers):
        made.update(*states(length), i)
    return made


def test_windows_see_the_length_of_their_first_layer():
    window = WindowCache([GrowingLayer() for _ in range(3)])
    for i, n in enumerate((4, 4, 2)):
        window.update(*states(n), i)
    assert window.get_seq_length() == 4 and window.shortest() == 2
    with pytest.raises(KeyError), window.seen_from(2):
        assert window.get_seq_length() == 2 and window.get_mask_sizes(3, 0) == (5, 0) and window.get_query_offset() == 2
        raise KeyError
    assert window.get_seq_length() == 4
    window.only_store = True
    with pytest.raises(Stored):
        window.update(*states(1), 2)
    assert window.layers[2].length == 3
    window.crop_to(3)
    assert [layer.length for layer in window.layers] == [3, 3, 3]


def test_a_borrowed_cache_comes_back_whole():
    plain = cache()
    before = [layer.keys.clone() for layer in plain.layers]
    new = states(2)
    with borrowed(plain, 3) as window:
        for i in range(3):
            window.update(*new, i)
        window.update(*states(4), 0)  # half-run: the other layers do not have it
    for layer, old in zip(plain.layers, before, strict=True):
        assert torch.equal(layer.keys, torch.cat([old, new[0]], 2)) and type(layer) is DynamicLayer


@pytest.mark.parametrize("wanted", [True, False])
def test_a_borrowed_cache_is_what_it_was_after_an_error(wanted):
    plain = cache()
    before = [layer.keys for layer in plain.layers]
    with pytest.raises(KeyboardInterrupt), borrowed(plain, 3, wanted) as window:
        window.update(*states(2), 0)
        window.crop_to(1)
        raise KeyboardInterrupt
    assert all(a.keys is b for a, b in zip(plain.layers, before, strict=True))


def test_nobody_wants_it():
    plain = cache()
    with borrowed(plain, 3, wanted=False) as window:
        window.update(*states(2), 0)
    assert plain.get_seq_length() == 5


def test_sliding_layers_come_back_sliding():
    """The framework keeps the last window - 1 slots and how many there ever were."""
    plain = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=6))
    theirs = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=6))
    new = states(6)
    with borrowed(plain, 2) as window:
        for i in range(2):
            window.update(*new, i)
            theirs.update(*new, i)
    for mine, other in zip(plain.layers, theirs.layers, strict=True):
        assert type(mine) is DynamicSlidingWindowLayer and torch.equal(mine.keys, other.keys)
        assert mine.get_seq_length() == other.get_seq_length() == 6
    assert why_not(plain, 2, 6) is None
    assert "window of 6 tokens is passed (7 tokens)" in why_not(plain, 2, 7)


def test_inference_mode_leaves_ordinary_tensors():
    plain = DynamicCache()
    with borrowed(plain, 2) as window, torch.inference_mode():
        for i in range(2):
            window.update(*states(3), i)
    assert not any(t.is_inference() for layer in plain.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (3, 3), (3, 7)])
def test_causal(queries, keys):
    mask = causal(queries, keys, torch.float32, torch.device("cpu"))
    assert mask.shape == (1, 1, queries, keys)
    for q in range(queries):
        assert (mask[0, 0, q] == 0).tolist() == [k <= keys - queries + q for k in range(keys)]
