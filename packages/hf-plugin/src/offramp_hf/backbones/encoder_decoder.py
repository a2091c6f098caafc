"""Encoder-decoder language models (T5, BART): exits are in the decoder, the encoder always runs in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from offramp.blocks import Call, Chain
from offramp.errors import BadArgument, OfframpError, UnsupportedModel
from offramp_hf.backbones._blocks import block_list, quiet
from offramp_hf.backbones._windows import check_windows
from offramp_hf.backbones.decoder import Decoder

#: what the model's forward must take, so that a window can be run on new decoder tokens
NEEDED = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "encoder_outputs")


class Scale(nn.Module):
    """Multiplies states before the projection, as T5 does with tied embeddings."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scaled states, same shape."""
        return hidden * self.factor


class Gain(nn.Module):
    """Multiplies states by a weight [width] of ones: what heads train where the model has no final norm, as BART."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the weighted states, same shape; bit-equal to them while the weight is one."""
        return hidden * self.weight.to(hidden)  # it is no part of the model, so nobody else moves it


class Bias:
    """Adds the model's own `final_logits_bias` [1, classes], as BART does; read at every call: it may be resized."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the finished logits, same shape."""
        bias: Tensor = self.model.final_logits_bias
        return logits + bias.to(logits.device).view(-1)


@dataclass
class HandingCall(Call):
    """A call of a block that hands on more than its state; skipped, it hands on what the block would have."""

    chain: HandingChain

    def skip(self, hidden: Tensor | None = None) -> Any:
        """Return the state in the block's own return shape, with what the block was handed or would have made."""
        items = list(super().skip(hidden))
        for item, path in self.chain.handed.items():
            given = self.args[path] if isinstance(path, int) else self.kwargs.get(path)
            makes = given is None and item == self.chain.item
            items[item] = self.chain.position_bias(self.hidden, self.kwargs.get("past_key_values")) if makes else given
        return tuple(items)


@dataclass
class Handing:
    """A handler that gets `HandingCall`s; an object and no closure, so that a deep copy of a model has its own."""

    chain: HandingChain
    handler: Callable[[int, Call], Any]

    def __call__(self, index: int, call: Call) -> Any:
        """Hand the call on."""
        return self.handler(index, HandingCall(call.original, call.args, call.kwargs, call.spec, self.chain))


@dataclass
class HandingChain(Chain):
    """Blocks that share what the first one makes, as T5's share its relative position bias.

    handed: item of the returned tuple -> argument of the next block that it becomes; item: the one that is a position
    bias; maker: the attention in the first block that makes it.
    """

    handed: dict[int, int | str] = field(default_factory=dict)
    item: int | None = None
    maker: Any = None

    def install(self, handler: Callable[[int, Call], Any]) -> Callable[[], None]:
        """Send every block call to `handler(index, call)`; returns the undo."""
        return super().install(Handing(self, handler))

    def position_bias(self, hidden: Tensor, cache: Any) -> Tensor:
        """Return the bias [1, heads, new, stored + new] of new tokens; `cache` knows how many its window has stored."""
        new, stored = hidden.shape[1], 0 if cache is None else cache.get_seq_length()
        bias: Tensor = self.maker.compute_bias(new, stored + new, device=hidden.device, past_seen_tokens=stored)
        return bias


class EncoderDecoder(Decoder):
    """An encoder-decoder language model of the transformers library, seen as the chain of its decoder's blocks."""

    kind = "encoder-decoder"
    mask_name = "decoder_attention_mask"
    #: relative positions are counted from the cache, so nodes of a tree cannot be placed
    trees = False
    position_name = None  # its decoder counts positions from the cache, and so by slot
    ragged = False

    def __init__(self, model: Any) -> None:
        self.model = model
        what = type(model).__name__
        if missing := [name for name in NEEDED if not self.takes(name)]:
            raise UnsupportedModel(
                f"{what} does not take {', '.join(missing)}; only models that read text are understood"
            )
        try:
            super().__init__(model)
            with quiet(model):
                self._chain = self._handing()
                check_windows(self, EncoderDecoder._windowed)
        except OfframpError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"{what} cannot be run block by block: {type(error).__name__}: {error}") from error

    def _blocks(self) -> tuple[str, nn.ModuleList]:
        decoder = self.model.get_decoder()
        outer = next((n for n, m in self.model.named_modules() if m is decoder and n), "decoder")
        name, blocks = block_list(decoder, None)
        return f"{outer}.{name}", blocks

    def _probe(self, rows: int, length: int) -> Any:
        ids, read = self._ids(rows, length), self._ids(rows, length + 2)
        mask, seen = torch.ones_like(ids), torch.ones_like(read)
        mask[0, -1] = seen[0, -2:] = 0  # with padding, so that masks are made and seen to carry the batch
        return self.model(
            input_ids=read, attention_mask=seen, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False
        )

    def _norms(self, norm: nn.Module, width: int) -> Iterator[nn.Module]:
        yield norm if any(True for _ in norm.parameters()) else nn.Sequential(norm, Gain(width))
        yield nn.Sequential(norm, Scale(width**-0.5))

    def _finishes(self) -> Iterator[Any]:
        if isinstance(getattr(self.model, "final_logits_bias", None), Tensor):
            yield Bias(self.model)  # first: while the bias is zero, a probe cannot tell it from nothing
        yield from super()._finishes()

    def _handing(self) -> Chain:
        """Find what the first block hands to the second beside its state, and who makes it."""
        made: list[tuple[Call, Any]] = []

        def handler(index: int, call: Call) -> Any:
            made.append((call, call.run()))
            return made[-1][1]

        undo = self._chain.install(handler)
        try:
            self._probe(2, 5)
        finally:
            undo()
        (first, output), (second, _) = made[:2]
        if not isinstance(output, tuple):
            return self._chain
        given: list[tuple[int | str, Any]] = [*enumerate(second.args), *second.kwargs.items()]
        handed = {i: p for i, v in enumerate(output) for p, g in given if i and isinstance(v, Tensor) and g is v}
        chain = HandingChain(self.blocks, self._chain.spec, handed=handed)
        for module in self.blocks[0].modules():
            if callable(getattr(module, "compute_bias", None)) and hasattr(module, "relative_attention_bias"):
                chain.maker = module
                bias = chain.position_bias(first.hidden, None)
                chain.item = next((i for i in handed if torch.equal(output[i], bias)), None)
        return chain if handed else self._chain

    def _windowed(self) -> tuple[Any, Tensor, Tensor]:
        """Return (cache, logits, the model's own logits) of two rows: two windows of three tokens, of two, and of
        one.
        """
        from offramp_hf.cache import GrowingLayer, WindowCache
        from offramp_hf.decode.place import Place
        from offramp_hf.decode.runner import Through

        read, ids, place = self._ids(2, 7), self._ids(2, 6), Place(None)
        seen = torch.ones_like(read)
        seen[0, -2:] = 0
        encoded = self.model.get_encoder()(input_ids=read, attention_mask=seen, return_dict=True)
        inputs = {"attention_mask": seen, "encoder_outputs": encoded}
        full = self.model(decoder_input_ids=ids, use_cache=False, **inputs).logits
        window = WindowCache([GrowingLayer() for _ in self.blocks])
        whole = EncoderDecoderCache(window, DynamicCache())
        through, parts = Through(self, window, {**inputs, "past_key_values": whole}), []
        for at in (slice(0, 3), slice(3, 5), slice(5, 6)):
            state = through.window(ids[:, at], 0, 1, None, place)
            parts.append(through.window(ids[:, at], 1, self.depth, state, place))
        return window, self._context.readout(torch.cat(parts, 1)), full

    def forward(self, tokens: Tensor, cache: Any, inputs: dict[str, Any]) -> Any:
        """Run the decoder on new tokens; `inputs` brings the encoder's output and the whole cache, `cache` is in it."""
        return self.model(decoder_input_ids=tokens, use_cache=True, **inputs, **self._cheap_logits())

    def runner(self, cache: Any, rows: int, padded: bool, inputs: dict[str, Any]) -> Any:
        """Return what runs windows: always through the model's own forward."""
        from offramp_hf.decode.runner import Through

        return Through(self, cache, inputs)

    def batch(self, batch: Any) -> dict[str, Tensor]:
        """Return a batch as keyword arguments on the model's device; it needs labels or decoder_input_ids."""
        if isinstance(batch, (list, tuple)) and len(batch) == 1:
            return self.batch(batch[0])
        if not isinstance(batch, Mapping) or not {"labels", "decoder_input_ids"} & batch.keys():
            raise BadArgument(
                f"a batch for {type(self.model).__name__} is a dict with input_ids and labels, or with input_ids and "
                f"decoder_input_ids (e.g. what generate returned): exits are in the decoder"
            )
        return super().batch(batch)

    def _rows(self, batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None]:
        """Return one row per decoder token that is not padding; with `labels`, the targets are the labels."""
        inputs = self.batch(batch)
        labels = inputs.pop("labels", None)
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
        keep, pad = self._real(inputs), getattr(self.model.config, "pad_token_id", None)
        position = (keep.long().cumsum(-1) - 1).clamp(min=0)
        if labels is not None:
            keep = keep & (labels != -100)
            if pad is not None and pad != getattr(self.model.config, "eos_token_id", None):
                keep = keep & (labels != pad)
        return inputs, keep, position, labels

    def _real(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return which decoder tokens [batch, token] are no padding: by their mask, else by the pads that end a row."""
        ids, mask = inputs["decoder_input_ids"], inputs.get("decoder_attention_mask")
        pad = getattr(self.model.config, "pad_token_id", None)
        if mask is not None:
            return mask.bool()
        real = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad
        real[:, 0] = True  # the start token, which is the padding token in T5
        return real.flip(-1).cumsum(-1).flip(-1) > 0
