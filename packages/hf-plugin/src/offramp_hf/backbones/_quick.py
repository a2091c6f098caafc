"""Quicker forms of what the framework's blocks call, put in while a text is decoded; equal to rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: the name of `grouped_attention` among the framework's attention functions
GROUPED = "offramp_grouped"


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0, **more: Any
) -> tuple[Any, None]:
    """Attend as the framework's "sdpa" does, with the query heads of one key head as rows of one product.

    The framework copies keys and values once per query head as soon as several tokens come with a mask; on a
    5 M-parameter model that is 10 % of a call of 2 to 6 tokens, and its checks are 2 % of a call of one.
    attention_mask: additive [1 or batch, 1, new, slots], or repeated per query head of a group already.
    """
    batch, heads, new, width = query.shape
    kv = key.shape[1]
    odd = heads % kv or dropout or any(more.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if odd or (new > 1 and (attention_mask is None or attention_mask.shape[1] != 1)):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **more)
        return out, None
    rows = heads // kv * new
    if attention_mask is not None and attention_mask.shape[-2] != rows:
        attention_mask = attention_mask.repeat(1, 1, heads // kv, 1)
    packed = query.reshape(batch, kv, rows, width)
    out = scaled_dot_product_attention(packed, key, value, attention_mask, scale=more.get("scaling"))
    return out.view(batch, heads, new, value.shape[-1]).transpose(1, 2).contiguous(), None


def head_groups(model: Any, blocks: Any) -> int:
    """Return how many query heads share a key head where `grouped_attention` can be used on this model, else 1."""
    if getattr(text_config(model), "_attn_implementation", None) != "sdpa":
        return 1
    groups = {int(g) for block in blocks for m in block.modules() if (g := getattr(m, "num_key_value_groups", None))}
    return groups.pop() if len(groups) == 1 else 1


def text_config(model: Any) -> Any:
    """Return the config of the model's decoder."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


@contextmanager
def grouped(model: Any) -> Iterator[None]:
    """Let the model attend with `grouped_attention` inside the context."""
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    config = text_config(model)
    before = config._attn_implementation_internal
    config._attn_implementation_internal = GROUPED
    try:
        yield
    finally:
        config._attn_implementation_internal = before


#: whether a module is, in this dtype, a root-mean-square norm that `rms_norm` equals to the bit
_EQUAL: WeakKeyDictionary[nn.Module, tuple[torch.dtype, bool]] = WeakKeyDictionary()


def _epsilon(module: nn.Module) -> float | None:
    """Return the epsilon of what may be a plain root-mean-square norm, else None."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1 or module._modules:
        return None
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


@contextmanager
def quick_norms(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let norms that torch has in one call use it inside the context; a probe decides which, to the bit.

    The framework's are seven calls; on a 5 M-parameter model this is 4 % of a token.
    """
    put: list[nn.Module] = []
    try:
        for module in modules:
            epsilon = _epsilon(module)
            if epsilon is None or "forward" in module.__dict__:
                continue
            weight: Any = module.weight
            if _EQUAL.get(module, (None, False))[0] != weight.dtype:
                probe = torch.linspace(-3, 5, 3 * len(weight), device=weight.device).to(weight.dtype).view(3, -1)
                with torch.no_grad():
                    same = torch.equal(module(probe), rms_norm(probe, weight.shape, weight, epsilon))
                _EQUAL[module] = weight.dtype, same
            if _EQUAL[module][1]:
                module.__dict__["forward"] = QuickNorm(module, epsilon)
                put.append(module)
        yield
    finally:
        for module in put:
            module.__dict__.pop("forward", None)


class QuickNorm:
    """The forward of a root-mean-square norm in one call."""

    def __init__(self, module: nn.Module, epsilon: float) -> None:
        self.parameters, self.epsilon = module._parameters, epsilon
        self.shape = list(module.weight.shape)  # type: ignore[arg-type]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.shape, self.parameters["weight"], self.epsilon)
