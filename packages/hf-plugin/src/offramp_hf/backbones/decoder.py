"""Decoder-only language models, understood by their structure: one list of blocks, a norm, an unembedding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone, Observed, Tap, Undo
from offramp.blocks import Call, Chain, learn_spec
from offramp.enable import RUN, Run
from offramp.errors import BadArgument, UnsupportedModel
from offramp.head import Around, HeadContext
from offramp_hf.backbones._blocks import block_list, quiet
from offramp_hf.backbones._finish import Finish
from offramp_hf.backbones._replay import Replay
from offramp_hf.backbones._windows import check_windows, direct_is_exact, rows_are_exact, trees_are_exact


class Decoder(Backbone):
    """A causal language model of the transformers library; `names`, readout and calls are found by running it once."""

    kind = "decoder-only"
    sequences = True
    compiles = True
    model: Any

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = self._config()
        name, blocks = self._blocks()
        self.blocks = list(blocks)
        self.names = [f"{name}.{i}" for i in range(len(self.blocks))]
        if not callable(getattr(model, "get_output_embeddings", None)) or model.get_output_embeddings() is None:
            raise UnsupportedModel(f"{type(model).__name__} has no unembedding; a language model head is needed")
        with quiet(model):
            spec, calls = learn_spec(self.blocks, lambda n: self._probe(n, 5))
            self._chain = Chain(self.blocks, spec)
            self.width = calls[0].hidden.shape[-1]
            self._context = self._find_readout()
            if self.kind == Decoder.kind:
                check_windows(self)

    def _config(self) -> Any:
        config = self.model.config
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def _blocks(self) -> tuple[str, nn.ModuleList]:
        return block_list(self.model, getattr(self.config, "num_hidden_layers", None))

    def _ids(self, rows: int, length: int) -> Tensor:
        device = self.model.get_input_embeddings().weight.device
        low = min(8, self.config.vocab_size - 1)
        ids: Tensor = (torch.arange(rows * length, device=device) % max(1, self.config.vocab_size - low) + low).view(
            rows, length
        )
        return ids

    def _probe(self, rows: int, length: int) -> Any:
        ids = self._ids(rows, length)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0  # with padding, so that masks are made and seen to carry the batch
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def _find_readout(self) -> HeadContext:
        """Find what runs between the last block and the logits, and prove it on a probe."""
        model, unembed = self.model, self.model.get_output_embeddings()
        inside = {m for b in self.blocks for m in b.modules()}
        after: list[nn.Module] = []
        seen: dict[str, Tensor] = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if module is self.blocks[-1]:
                after.clear()
                seen["hidden"] = output[0] if isinstance(output, tuple) else output
            elif "hidden" in seen and isinstance(output, Tensor):
                after.append(module)

        watched = [m for m in model.modules() if m not in inside and not any(c in self.blocks for c in m.modules())]
        handles = [m.register_forward_hook(note) for m in [*watched, self.blocks[-1]]]
        try:
            logits = self._probe(2, 5).logits
        finally:
            for handle in handles:
                handle.remove()
        # what only wraps the unembedding (T5Gemma, BERT) is looked into
        after = [m for m in after if m is unembed or not any(c is unembed for c in m.modules())]
        outer = [m for m in after if not any(m is not o and m in set(o.modules()) for o in after)]
        before = [m for m in outer if m is not unembed and not isinstance(m, nn.Dropout)]
        plain = before[0] if len(before) == 1 else nn.Sequential(*before)
        width = seen["hidden"].shape[-1]
        fitting = []
        for norm, finish in product(self._norms(plain, width), self._finishes()):
            context = HeadContext(norm, unembed, finish, width, logits.shape[-1], self.blocks[-1])
            found = context.readout(seen["hidden"])
            if torch.allclose(found, logits, rtol=1e-3, atol=1e-4, equal_nan=True):
                fitting.append((float((found - logits).abs().nan_to_num().max()), context))
        if fitting:  # the best, for a soft cap hardly changes small logits
            return min(fitting, key=lambda fit: fit[0])[1]
        names = ", ".join(type(m).__name__ for m in [*before, unembed])
        raise UnsupportedModel(
            f"{type(model).__name__}: its logits are not {names} applied to the last block's state; "
            "its readout is not understood"
        )

    def _norms(self, norm: nn.Module, width: int) -> Iterator[nn.Module]:
        yield norm

    def _finishes(self) -> Iterator[Any]:
        yield from Finish.candidates(self.config)

    def taps(self) -> Sequence[Tap]:
        """Return every tap; states are [batch, token, width]."""
        return [Tap(n, i + 1, self.width, "batch token width") for i, n in enumerate(self.names)]

    def context(self) -> HeadContext:
        """Return final norm, unembedding and what follows it."""
        return self._context

    def chain(self) -> Chain:
        """Return the decoder blocks."""
        return self._chain

    def pool(self, hidden: Tensor) -> Tensor:
        """Return one row per token: [batch, token, width] -> [batch * token, width]."""
        return hidden.reshape(-1, hidden.shape[-1])

    def batch(self, batch: Any) -> dict[str, Tensor]:
        """Return a batch of the user's data as keyword arguments on the model's device: a tensor of ids, or a
        mapping.
        """
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if isinstance(batch, (list, tuple)) and len(batch) == 1:
            return self.batch(batch[0])
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise BadArgument(f"a batch for {type(self.model).__name__} is ids [rows, tokens] or a dict with input_ids")
        device = self.model.get_input_embeddings().weight.device
        return {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}

    def call(self, batch: Any) -> Any:
        """Run the model's own forward."""
        return self.model(**self.batch(batch))

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Return one row per token that is not padding; with `labels`, the targets are the next tokens."""
        return self._observed(*self._rows(batch), depths, whole)

    def generated(self, batch: Any) -> Tensor:
        """Return which generated token each place [batch, token] predicts: places count from the first that `observe`
        returns, so what the labels leave out (-100) at the start is the prompt."""
        return self._rows(batch)[1].long().cumsum(-1) - 1

    def _rows(self, batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None]:
        """Return inputs, which places are rows [batch, token], their positions and their targets."""
        inputs = self.batch(batch)
        labels = inputs.pop("labels", None)
        mask = inputs.get("attention_mask")
        keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
        position = (keep.long().cumsum(-1) - 1).clamp(min=0)
        targets = None
        if labels is not None:
            targets = torch.full_like(labels, -100)
            targets[:, :-1] = labels[:, 1:]
            keep = keep & (targets != -100)
        return inputs, keep, position, targets

    def _observed(
        self,
        inputs: dict[str, Tensor],
        keep: Tensor,
        position: Tensor,
        targets: Tensor | None,
        depths: Sequence[int],
        whole: bool,
    ) -> Observed:
        """Run the full model and return the tokens of `keep` [batch, token] as rows."""
        calls: list[Call] = []
        with self._chain.capture([*depths, self.depth], calls) as states:
            self.model(**inputs, use_cache=False, **self._cheap_logits())
        sample = torch.arange(len(keep), device=keep.device)[:, None].expand_as(keep)
        seen = Observed(
            [states[d][keep] for d in depths],
            states[self.depth][keep],
            None if targets is None else targets[keep],
            position[keep],
            sample[keep],
        )
        if whole:
            seen.whole, seen.keep = [states[d] for d in depths], keep
            seen.around = Around(position, inputs.get(self.mask_name), None, calls[-1].through)
        return seen

    def _cheap_logits(self) -> dict[str, Any]:
        keeps = getattr(self.model, "_supports_logits_to_keep", None)
        return {"logits_to_keep": 1} if keeps is not None and keeps() else {}

    def flag(self) -> Mapping[str, Any] | None:
        """Return `early_exit` of the model's config or of its generation config."""
        for config in (self.model.config, getattr(self.model, "generation_config", None)):
            found = getattr(config, "early_exit", None)
            if isinstance(found, Mapping):
                return found
        return None

    def drive(self, run: Run) -> Undo:
        """Take over `model.generate` for as long as `run` is enabled."""
        from offramp_hf.decode.compiled import check_compile
        from offramp_hf.decode.intercept import Generation

        check_compile(self, run.options)
        undo: Undo = Generation(run).install()
        return undo

    def calls(self, ids: Tensor, **inputs: Any) -> list[Call]:
        """Return how the model would call each block on `ids`, without running any."""
        made: list[Call] = []

        def handler(index: int, call: Call) -> Any:
            made.append(call)
            return call.skip()

        undo = self._chain.install(handler)
        try:
            self.model(input_ids=ids, **inputs, **self._cheap_logits())
        finally:
            undo()
        return made

    #: the model's arguments for padding and for positions (None: it counts them from the cache), in tokens being
    #: decoded
    mask_name = "attention_mask"
    position_name: str | None = "position_ids"
    #: whether rows of a batch may keep different numbers of drafted tokens: shorter ones are moved right in the cache
    ragged = True

    def takes(self, name: str) -> bool:
        """Whether the model's forward has an argument of this name."""
        return name in inspect.signature(type(self.model).forward).parameters

    def forward(self, tokens: Tensor, cache: Any, inputs: dict[str, Any]) -> Any:
        """Run the model's own forward on new tokens with a cache."""
        return self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **inputs, **self._cheap_logits())

    def skipped(self, index: int, call: Call, cache: Any) -> Any:
        """Return what a skipped block hands on."""
        return call.skip()

    def argument_names(self, call: Call) -> list[str]:
        """Return the names of a block call's positional arguments."""
        return list(inspect.signature(type(self.blocks[0]).forward).parameters)[1:]

    def runner(self, cache: Any, rows: int, padded: bool, inputs: dict[str, Any]) -> Any:
        """Return the fastest way to run windows that a probe has shown to be exact for this model."""
        from offramp_hf.decode.compiled import single
        from offramp_hf.decode.direct_rows import DirectRows
        from offramp_hf.decode.runner import Through

        if not inputs and self.direct_fits:
            if rows == 1 and not padded:
                return single(self)(self, cache)
            if self.rows_fit:
                return DirectRows(self, cache)
        return Through(self, cache, inputs)

    @property
    def compiled(self) -> bool:
        """Whether the model is enabled with compile=True."""
        run = self.model.__dict__.get(RUN)
        return run is not None and run.options.compile

    @cached_property
    def replay(self) -> Replay:
        """Return the recordings of the blocks; they last as long as the model is enabled."""
        return Replay(self.blocks)

    @cached_property
    def rows_fit(self) -> bool:
        """Whether that holds for padded rows too."""
        with quiet(self.model):
            return rows_are_exact(self)

    @cached_property
    def direct_fits(self) -> bool:
        """Whether running the blocks directly gives the model's own logits; a probe decides, once."""
        with quiet(self.model):
            return direct_is_exact(self)

    @cached_property
    def trees(self) -> bool:
        """Whether a tree of drafts can be verified in one call; a probe decides, once."""
        with quiet(self.model):
            return trees_are_exact(self)
