"""Encoder classifiers (one prediction per row), understood by their structure and proven on a probe."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone, Observed, Tap, Undo
from offramp.blocks import Call, Chain, learn_spec
from offramp.enable import Run
from offramp.engine import SinglePass
from offramp.errors import BadArgument, UnsupportedModel
from offramp.head import HeadContext
from offramp.kernels.confidence import PREDICTION
from offramp.options import Options
from offramp_hf.backbones._blocks import quiet
from offramp_hf.backbones._readout import find_blocks, find_readout

TOKENS = 6


def unchanged(logits: Tensor) -> Tensor:
    """Return the logits as they are: nothing follows an encoder's projection."""
    return logits


class Encoder(Backbone):
    """A classifier of the transformers library that reads one state per row: its blocks, readout and calls are found by
    running it on a few random ids. Raises `UnsupportedModel` with the reason when anything does not fit.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.what = model, type(model).__name__
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if not isinstance(embeddings, nn.Embedding):
            raise UnsupportedModel(f"{self.what} does not take token ids; exits of this plugin are for models of text")
        self.embeddings = embeddings
        self.takes = tuple(inspect.signature(type(model).forward).parameters)
        with quiet(model):
            classes = self._classes()
            self.names, self.blocks = find_blocks(model, lambda: self._probe(3))
            spec, calls = learn_spec(self.blocks, self._probe)
            if "position_ids" in self.takes:  # given per row, they may reach the blocks as one more batched argument
                more, _ = learn_spec(self.blocks, lambda n: self._probe(n, positions=True))
                spec = dataclasses.replace(spec, batched=spec.batched | more.batched)
            self._chain = Chain(self.blocks, spec)
            self.width = calls[0].hidden.shape[-1]
            found = find_readout(model, self.blocks[-1], self._inputs(3)["attention_mask"], lambda: self._probe(3))
            self._pool, width = found.pool, self.width
            self._context = HeadContext(found.norm, found.projection, unchanged, width, classes)
            self._prove()

    def _inputs(self, rows: int, positions: bool = False) -> dict[str, Tensor]:
        """Return random ids [rows, TOKENS]: the first row full, each further one padded a token more."""
        device, pad = self.embeddings.weight.device, getattr(self.model.config, "pad_token_id", None) or 0
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(0, self.embeddings.num_embeddings - 1, (rows, TOKENS), generator=generator)
        ids = torch.where(ids >= pad, ids + 1, ids)  # never the padding id by chance
        mask = torch.arange(TOKENS)[None, :] < TOKENS - torch.arange(rows)[:, None] % (TOKENS - 1)
        found = {"input_ids": torch.where(mask, ids, pad), "attention_mask": mask.long()}
        if positions:
            found["position_ids"] = torch.arange(TOKENS).repeat(rows, 1)
        return {k: v.to(device) for k, v in found.items()}

    def _probe(self, rows: int, positions: bool = False) -> Any:
        """Run the model as a user would and return its logits, or None when it has none."""
        inputs = {k: v for k, v in self._inputs(rows, positions).items() if k in self.takes}
        try:
            output = self.model(**inputs, return_dict=True)
        except UnsupportedModel:
            raise
        except Exception as error:  # a model may refuse ids in any way; its own words are the reason
            raise UnsupportedModel(f"{self.what} cannot be run on token ids to learn its structure: {error}") from error
        return getattr(output, "logits", None)

    def _classes(self) -> int:
        logits = self._probe(3)
        if not isinstance(logits, Tensor):
            raise UnsupportedModel(
                f"{self.what} returns no logits, so an exit has nothing to predict; load it with a classifier, e.g. "
                f"AutoModelForSequenceClassification.from_pretrained(...)"
            )
        if logits.dim() != 2 or logits.shape[0] != 3:
            raise UnsupportedModel(
                f"{self.what} returns logits of shape {tuple(logits.shape)} for 3 rows of {TOKENS} tokens; exits of an "
                f"encoder need one prediction per row, [rows, classes]"
            )
        return logits.shape[1]

    def _prove(self) -> None:
        """Inject random states of several sizes after the last block: the readout must give the model's logits."""
        mask = self._inputs(3)["attention_mask"]
        low = self.embeddings.weight.dtype in (torch.float16, torch.bfloat16)
        near = 2e-2 if low else 1e-6
        for size in (0.1, 1.0, 10.0):
            noise = size * torch.randn(3, TOKENS, self.width, generator=torch.Generator().manual_seed(0))
            state = noise.to(self.embeddings.weight)

            def inject(index: int, call: Call, state: Tensor = state) -> Any:
                return call.skip(state if index == self.depth - 1 else None)

            undo = self._chain.install(inject)
            try:
                logits = self._probe(3)
            finally:
                undo()
            ours = self._context.readout(self.pool(state, mask))
            if not torch.allclose(ours, logits, rtol=near, atol=near * max(1.0, logits.abs().max().item())):
                raise UnsupportedModel(
                    f"{self.what}: its logits are not its projection applied to {self._pool.kind} token(s) of the last "
                    f"state through {[type(m).__name__ for m in self._context.norm.children()]} (differs by "
                    f"{(ours - logits).abs().max().item():.1e})"
                )

    def taps(self) -> Sequence[Tap]:
        """Return every tap; states are [batch, token, width]."""
        return [Tap(n, i + 1, self.width, "batch token width") for i, n in enumerate(self.names)]

    def context(self) -> HeadContext:
        """Return the model's own way from a pooled state to its logits."""
        return self._context

    def chain(self) -> Chain:
        """Return the encoder blocks."""
        return self._chain

    def pool(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what the classifier reads: [batch, token, width] -> [batch, width].

        mask: [batch, token], 1 = real token; only classifiers that average over tokens look at it, None = all are real.
        """
        return self._pool(hidden, mask)

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """Return a batch of the user's data as keyword arguments on the model's device: ids, or a mapping."""
        if isinstance(batch, (list, tuple)) and len(batch) == 1:
            batch = batch[0]
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if not isinstance(batch, Mapping) or not {"input_ids", "inputs_embeds"} & set(batch):
            kind = type(batch).__name__
            raise BadArgument(f"a batch for {self.what} is ids [rows, tokens] or a dict with input_ids, not {kind}")
        device = self.embeddings.weight.device
        return {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}

    def call(self, batch: Any) -> Any:
        """Run the model's own forward."""
        return self.model(**self.inputs(batch))

    def observe(self, batch: Any, depths: Sequence[int], whole: bool = False) -> Observed:
        """Return one row per input row; class labels [rows] become the targets, of a regression numbers [rows] or
        [rows, outputs]; other labels are ignored."""
        inputs = self.inputs(batch)
        labels = self._targets(inputs.pop("labels", None))
        with self._chain.capture([*depths, self.depth]) as states:
            self.model(**inputs)
        mask = inputs.get("attention_mask")
        final = self.pool(states[self.depth], mask)
        sample = torch.arange(len(final), device=final.device)
        return Observed([self.pool(states[d], mask) for d in depths], final, labels, sample=sample)

    def _targets(self, labels: Tensor | None) -> Tensor | None:
        """Return labels that exits can be trained on, as the model itself reads them, or None."""
        outputs = self._context.classes
        kind = getattr(self.model.config, "problem_type", None) or ("regression" if outputs == 1 else None)
        if labels is None:
            return None
        if kind == "regression":
            return labels.float() if labels.numel() == len(labels) * outputs else None
        return None if labels.is_floating_point() or labels.dim() != 1 else labels

    def drive(self, run: Run) -> Undo:
        """Let rows leave the batch inside the model's own forward."""
        plain = Options()
        odd = [f for f in ("verify", "draft", "kv", "rollback") if getattr(run.options, f) != getattr(plain, f)]
        if odd:
            given = ", ".join(f"{f}={getattr(run.options, f)!r}" for f in odd)
            raise BadArgument(f"{given}: only for models that generate; {self.what} classifies in one forward")
        if self._context.classes < 2 and run.policy.statistics() & PREDICTION:
            raise BadArgument(
                f"{self.what} has one output (a regression), which has no probabilities for {run.policy}; use a policy "
                f'that does not read them: offramp.enable(model, "patience", patience=1, tolerance=0.1), "agreement" '
                f'with threshold=0.1, or "saturation"'
            )
        return EncoderPass(run, self._context.projection).install()


class EncoderPass(SinglePass):
    """One forward of an encoder classifier.

    Blocks run as usual outside the model's own `forward` (e.g. `model.bert(...)`), and in calls that ask for the hidden
    states or attentions of all blocks: those exist only when all blocks run. Such a call warns once, or raises
    `BadArgument` with strict=True.
    """

    def __init__(self, run: Run, output: nn.Module) -> None:
        self.whole, self.mask = True, None
        super().__init__(run, output)

    def install(self) -> Undo:
        """Hook in; returns the exact undo."""
        undo = super().install()
        handle = self.run.model.register_forward_pre_hook(self.notice, with_kwargs=True)
        self.removes.append(handle.remove)
        return undo

    def notice(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Look at the arguments of the user's call: what they ask for, and which tokens are real."""
        names = self.run.backbone.takes  # type: ignore[attr-defined]
        given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        self.mask = given.get("attention_mask")
        config = self.run.model.config
        asked = [k for k in ("output_hidden_states", "output_attentions") if given.get(k, getattr(config, k, False))]
        self.whole = bool(asked)
        if not asked or self.run.paused:
            return
        text = f"{asked[0]} needs every block, so this call runs the full model"
        if self.run.options.strict:
            raise BadArgument(f"{text}; leave it out, or enable without strict=True")
        if not self.run.memory.get("warned"):
            self.run.memory["warned"] = True
            warnings.warn(text, stacklevel=2)

    def block(self, index: int, call: Call) -> Any:
        """Run one block on the rows that are left, or on all of them in a call that needs all.

        An empty batch runs none and gives logits [0, classes]; several families fail on it by themselves.
        """
        if self.whole or self.run.paused:
            return call.run()
        return super().block(index, call) if call.hidden.shape[0] else call.skip()

    def pool(self, hidden: Tensor) -> Tensor:
        """Return what the classifier reads of the rows that are left."""
        mask = self.mask
        if mask is not None and self.rows is not None:
            mask = mask[self.rows]
        return self.run.backbone.pool(hidden, mask)  # type: ignore[call-arg]

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count, and forget the call."""
        super().end(module, args, output)
        self.whole, self.mask = True, None
