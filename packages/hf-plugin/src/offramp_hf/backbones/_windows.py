"""Proof that a decoder can be run in windows: its blocks over a cache, some later than others, give its own logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.errors import UnsupportedModel
from offramp_hf._compat import why_not_rope

if TYPE_CHECKING:
    from offramp_hf.backbones.decoder import Decoder

#: largest error that counts as rounding, as a share of the largest logit: 1e-6 measured in float32; in half precision
#: the mean counts, for there a router may choose another expert
ROUNDING, MEAN_LOW = 1e-3, 2e-2
LOW = (torch.float16, torch.bfloat16)
#: largest error of a logit that counts as rounding to 16 bits, as a share of the logits' standard deviation: 0.08
#: measured in 32 blocks of width 2,048, and 1.4 where a mask is left out
SPREAD = 0.3


def check_windows(decoder: Decoder, probe: Callable[[Any], tuple[Any, Tensor, Tensor]] | None = None) -> None:
    """Refuse a model whose blocks, run in windows over a cache of keys and values, do not give its own logits.

    probe(decoder) runs six tokens in windows, as `windowed` does for decoder-only models, and returns what it returns.
    Raises `UnsupportedModel` with the reason: a recurrent state, keys and values shared between blocks, or something
    that passes between blocks beside the hidden state.
    """
    what = type(decoder.model).__name__
    if not decoder.takes("past_key_values"):
        raise UnsupportedModel(
            f"{what} takes no past_key_values: its blocks carry a state instead of keys and values per token, and "
            f"rejected tokens cannot be taken out of it"
        )
    try:
        cache, found, wanted = (probe or windowed)(decoder)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"{what} cannot be run block by block: {type(error).__name__}: {error}") from error
    if empty := [i for i, layer in enumerate(cache.layers) if layer.length != 6]:
        raise UnsupportedModel(
            f"{what}: blocks {empty} do not store keys and values of their own for every token (shared with other "
            f"blocks, or a state of another kind), so they cannot run later than the others"
        )
    off = _off(found, wanted)
    if not _small(off, wanted.dtype):
        raise UnsupportedModel(
            f"{what}: its blocks, run in windows over a cache, do not give the model's own logits "
            f"(off by {off.max():.2g} of the largest); what passes between its blocks is not understood"
        )


def _off(found: Tensor, wanted: Tensor) -> Tensor:
    """Return how far logits are off, in parts of the largest one wanted."""
    return (found - wanted).float().abs().nan_to_num() / wanted.float().abs().nan_to_num().max().clamp(min=1e-6)


def _small(off: Tensor, dtype: torch.dtype) -> bool:
    """Whether that is rounding of this type: in all places, of 16 bits on the average."""
    return bool(off.mean() < MEAN_LOW if dtype in LOW else off.max() < ROUNDING)


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Whether logits agree in every place, also in 16 bits: what decides how blocks are called, not whether."""
    if wanted.dtype in LOW:
        return bool((found - wanted).float().abs().max() < SPREAD * wanted.float().std())
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


def windowed(decoder: Decoder, make: Callable[[Any], Any] | None = None) -> tuple[Any, Tensor, Tensor]:
    """Return (cache, logits, the model's own logits) of two rows, one padded: three tokens at once, then two windows of
    two tokens, then two of one. make(cache): the runner, `Through` when None."""
    from offramp_hf.cache import GrowingLayer, WindowCache
    from offramp_hf.decode.place import Place
    from offramp_hf.decode.runner import Through

    ids = decoder._ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    where = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if decoder.takes("position_ids") else {}
    full = decoder.model(input_ids=ids, attention_mask=mask, use_cache=False, **where).logits
    cache = WindowCache([GrowingLayer() for _ in decoder.blocks])
    decoder.forward(ids[:, :3], cache, {"attention_mask": mask[:, :3], **{k: v[:, :3] for k, v in where.items()}})
    through, place, parts = make(cache) if make else Through(decoder, cache, {}), Place(mask, 6), []
    with through.running():
        for at in (slice(3, 5), slice(5, 6)):
            state = through.window(ids[:, at], 0, 1, None, place)
            parts.append(through.window(ids[:, at], 1, decoder.depth, state, place))
        return cache, decoder.context().readout(torch.cat(parts, 1)), full[:, 3:]


def rows_are_exact(decoder: Decoder) -> bool:
    """Whether running the blocks directly on padded rows gives the model's own logits."""
    from offramp_hf.decode.direct import Unfit
    from offramp_hf.decode.direct_rows import DirectRows

    try:
        _, found, wanted = windowed(decoder, lambda cache: DirectRows(decoder, cache))
    except (Unfit, LookupError, RuntimeError, TypeError):
        return False
    return _close(found, wanted)


def direct_is_exact(decoder: Decoder) -> bool:
    """Whether running the blocks directly gives the model's own logits: three tokens, then two, then one."""
    from offramp_hf.cache import GrowingLayer, WindowCache
    from offramp_hf.decode.direct import Direct, Unfit
    from offramp_hf.decode.place import Place

    devices = {p.device for p in decoder.model.parameters()}
    if len(devices) != 1 or why_not_rope(decoder.model, 1 << 62) is not None:  # tables of such positions do not last
        return False
    ids, place = decoder._ids(1, 6), Place(None)
    try:
        # learned positions end somewhere, so a few tokens come first: `Direct` asks for many positions
        if not torch.equal(decoder.calls(ids, use_cache=False)[0].hidden, decoder.model.get_input_embeddings()(ids)):
            return False
        full = decoder.model(input_ids=ids, use_cache=False).logits
        direct = Direct(decoder, WindowCache([GrowingLayer() for _ in decoder.blocks]))
        parts = []
        with direct.running():
            for at in (slice(0, 3), slice(3, 5), slice(5, 6)):
                state = direct.window(ids[:, at], 0, 1, None, place)
                parts.append(direct.window(ids[:, at], 1, decoder.depth, state, place))
            logits = decoder.context().readout(torch.cat(parts, 1))
    except (Unfit, LookupError, RuntimeError, TypeError):
        return False
    return _close(logits, full)


def trees_are_exact(decoder: Decoder) -> bool:
    """Whether several continuations, run in one call that says who sees whom, give the model's own logits."""
    from offramp_hf.cache import GrowingLayer, WindowCache
    from offramp_hf.decode.place import Place, Tree
    from offramp_hf.decode.runner import Through

    ids = decoder._ids(2, 8)
    mask = torch.ones_like(ids[:, :4])
    mask[0, 0] = 0
    where = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if decoder.takes("position_ids") else {}
    tree = Tree(4, ids[:, 4:5])
    tree.grow(torch.zeros_like(ids[:, :2]), ids[:, 5:7])
    tree.grow(torch.tensor([[2], [1]], device=ids.device), ids[:, 7:])
    cache = WindowCache([GrowingLayer() for _ in decoder.blocks])
    place = Place(torch.cat([mask, torch.ones_like(ids[:, 4:])], 1), 8, tree=tree)
    try:
        decoder.forward(ids[:, :4], cache, {"attention_mask": mask, **where})
        through = Through(decoder, cache, {})
        found = decoder.context().readout(through.window(tree.tokens, 0, decoder.depth, None, place))
        for row in range(2):
            for node in range(4):
                nodes = [i + 4 for i in tree.seen[row, node].nonzero().squeeze(-1).tolist()]
                alone = torch.cat([ids[row : row + 1, int(row == 0) : 4], ids[row : row + 1, nodes]], 1)
                full = decoder.model(input_ids=alone, use_cache=False).logits[0, -1]
                if not _small(_off(found[row, node], full), full.dtype):
                    return False
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    return True
