"""Risk of whole texts: how far early generation strays from the full model's, certified over prompts (CALM)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

import offramp
from offramp._registry import policy_from
from offramp.attach import find
from offramp.calibrate import check_levels, template
from offramp.calibration import Calibration
from offramp.calibrators.fixed_sequence import Promise, walk
from offramp.checkpoint import read_safetensors, write_bytes
from offramp.enable import Run, paused
from offramp.errors import BadArgument, DamagedFile, OfframpError, UnknownName, did_you_mean
from offramp.policy import ExitPolicy
from offramp.record import evaluating, fingerprint, track
from offramp_hf.similarity import METRICS

FORMAT = 1


@dataclass(frozen=True, eq=False)
class TextTrace:
    """What generating early did to N whole texts, rung by rung of a policy's ladder.

    losses: [N, R] in [0, 1], rows are prompts, column r is rung r; depths: [N, R] mean exit depth of the text in
    blocks; ladder: every rung, safest first, of which the first R were run: the last of them is the first whose mean
    loss was above `limit`, if any was; risk: "textual_consistency:METRIC" or "risk_consistency:METRIC"; tokens:
    longest text; options: how it was run (`kv`); model_hash: of model and heads. Raises `BadArgument`.
    """

    losses: Tensor
    depths: Tensor
    ladder: tuple[ExitPolicy, ...]
    risk: str
    limit: float
    tokens: int
    options: Mapping[str, Any]
    model_hash: str = ""

    def __post_init__(self) -> None:
        for name in ("losses", "depths"):
            object.__setattr__(self, name, getattr(self, name).detach().cpu().double())
        losses = self.losses
        if losses.dim() != 2 or losses.shape != self.depths.shape or not 1 <= losses.shape[1] <= len(self.ladder):
            raise BadArgument(
                f"losses {list(losses.shape)} and depths {list(self.depths.shape)} must both be [prompts, rungs] with "
                f"1 to {len(self.ladder)} rungs"
            )
        if not bool(((losses >= 0) & (losses <= 1)).all()):
            raise BadArgument("losses must lie in [0, 1]; the bounds of a certificate need that")

    def __len__(self) -> int:
        return len(self.losses)

    def __getitem__(self, rows: Any) -> TextTrace:
        """Return the trace of some prompts: a slice, a list or tensor of indices, a bool mask, or one index."""
        pick = [int(rows)] if isinstance(rows, Integral) else rows
        if not isinstance(pick, slice):
            pick = torch.as_tensor(pick, dtype=None if len(pick) else torch.long)
        return dataclasses.replace(self, losses=self.losses[pick], depths=self.depths[pick])

    def __repr__(self) -> str:
        return f"TextTrace({len(self)} prompts, {self.losses.shape[1]} of {len(self.ladder)} rungs, {self.risk})"

    @property
    def data_hash(self) -> str:
        """Return the sha256 of losses, depths and of how they were made."""
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for tensor in (self.losses, self.depths):
            digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _settings(self) -> dict[str, Any]:
        body = {n: getattr(self, n) for n in ("risk", "limit", "tokens", "model_hash")}
        return {**body, "options": dict(self.options), "ladder": [rung.config() for rung in self.ladder]}

    def calibrate(self, *, alpha: float = 0.05, delta: float = 0.05) -> Calibration:
        """Return the boldest rung whose expected loss on a fresh prompt is at most alpha, with confidence 1 - delta.

        The promise is for prompts drawn as these were, greedy texts of up to `tokens` tokens and the `options` of the
        recording, with which `enable` then runs. Raises `BadArgument`. Paper: CALM (arXiv 2207.07061), with the
        Hoeffding-Bentkus p-value.
        """
        check_levels(alpha, delta)
        if not len(self):
            raise BadArgument("the trace has no prompts to calibrate on; record some: record_texts(model, prompts, ..)")
        if alpha >= self.limit and self.losses.shape[1] < len(self.ladder):
            raise BadArgument(
                f"alpha={alpha:g} is not below limit={self.limit:g}, beyond which bolder rungs were not run; record "
                f"with record_texts(..., limit={min(1.0, 2 * alpha):g})"
            )
        promise = Promise(self.risk, False, alpha, delta, self.data_hash, self.model_hash)
        found = walk(self.ladder, self.losses.T.numpy(), promise)
        if found.certificate is None:
            return found
        note = f"promised for greedy texts of up to {self.tokens} tokens, run with {dict(self.options)}"
        return dataclasses.replace(found, note=note, options=dict(self.options))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        from safetensors.torch import save

        body = {"format": FORMAT, **self._settings(), "data_hash": self.data_hash}
        tensors = {"losses": self.losses.contiguous(), "depths": self.depths.contiguous()}
        write_bytes(Path(path), save(tensors, {"texts": json.dumps(body)}))

    @classmethod
    def load(cls, path: str | Path) -> TextTrace:
        """Read what `save` wrote; raises `DamagedFile` when it is not that, whole and unchanged."""
        tensors, metadata = read_safetensors(Path(path))
        try:
            body = json.loads(metadata["texts"])
            newer = body.pop("format") > FORMAT
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"{path} is a safetensors file, but no text trace; write one with .save(path)") from error
        if newer:
            raise DamagedFile(
                f"{path} is newer than this offramp, which reads up to format {FORMAT}: pip install -U offramp-hf"
            )
        try:
            digest = body.pop("data_hash")
            given: dict[str, Any] = {**tensors, **body, "ladder": tuple(policy_from(rung) for rung in body["ladder"])}
            trace = cls(**given)
        except (OfframpError, KeyError, TypeError) as error:
            raise DamagedFile(f"{path}: the trace is not complete ({error})") from error
        if trace.data_hash != digest:
            raise DamagedFile(f"{path}: its contents are not those it was saved with (data_hash differs)")
        return trace


def record_texts(
    model: Any,
    prompts: Any,
    policy: str | ExitPolicy | Calibration | Mapping[str, Any],
    *,
    kv: str = "propagate",
    max_new_tokens: int = 64,
    metric: str = "rouge_l",
    references: Sequence[Any] | None = None,
    tokenizer: Any = None,
    every: int = 5,
    limit: float = 0.5,
    progress: bool = True,
    **options: Any,
) -> TextTrace:
    """Generate each prompt greedily with the full model once, and early at the rungs of the policy's ladder.

    prompts: ids [n, length], a list of ids, or of strings with `tokenizer`; policy: a name with its `options`, or as
    for `enable`: its threshold is what the rungs change; metric: "rouge_l" or "token_f1"; references: one text per
    prompt (ids or strings). Without them the loss is 1 - metric(early, full); with them it is max(0, metric(full,
    reference) - metric(early, reference)). every: run each so many-th rung (5: steps of 0.05); limit: no bolder rung
    is run after the first with a mean loss above it; alpha must lie below. Raises `BadArgument`, `UnknownName`, and
    where the model would not exit early what `enable(strict=True)` raises. Paper: CALM (arXiv 2207.07061).
    """
    ids, goals = _checked(prompts, references, tokenizer, metric, every, limit)
    exits = find(model)
    safest = template(policy, exits.at, exits.backbone.context().classes, **options)
    ladder = safest.ladder(exits.at, exits.backbone.context().classes)[::every]
    score, columns, depths = METRICS[metric], [], []
    with evaluating(model), offramp.enable(model, ladder[0], kv=kv, strict=True) as run:
        write = _Writer(model, run, max_new_tokens)
        with paused(model):
            full = [write(i) for i in track(ids, "full model", progress, len(ids))]
        goal, best = full, np.ones(len(ids))
        if goals is not None:
            goal, best = goals, np.array([score(t, g) for t, g in zip(full, goals, strict=True)])
        for rung in track(ladder, "rungs", progress, len(ladder)):
            run.policy = rung
            made = [(write(i), run.stats.depth_mean) for i in ids]
            alike = np.array([score(text, g) for (text, _), g in zip(made, goal, strict=True)])
            columns.append(np.maximum(best - alike, 0.0))
            depths.append([depth for _, depth in made])
            if columns[-1].mean() > limit:
                break
    return TextTrace(
        torch.from_numpy(np.stack(columns, 1)),
        torch.tensor(depths, dtype=torch.float64).T,
        tuple(ladder),
        f"{'textual' if goals is None else 'risk'}_consistency:{metric}",
        float(limit),
        max_new_tokens,
        {"kv": kv},
        fingerprint(exits),
    )


class _Writer:
    """Writes the text after one prompt, with nothing remembered from the texts before it."""

    def __init__(self, model: nn.Module, run: Run, tokens: int) -> None:
        self.model, self.run, self.tokens = model, run, tokens
        self.ends = _ends(model)

    def __call__(self, prompt: Tensor) -> list[int]:
        self.run.stats.reset()
        self.run.memory.clear()
        model: Any = self.model
        ids = prompt[None].to(model.device)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.tokens, do_sample=False, num_beams=1
        )
        start = 1 if model.config.is_encoder_decoder else len(prompt)
        text: list[int] = made[0, start:].tolist()
        return text[:-1] if text and text[-1] in self.ends else text


def _ends(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _checked(
    prompts: Any, references: Any, tokenizer: Any, metric: str, every: int, limit: float
) -> tuple[list[Tensor], list[list[int]] | None]:
    """Return prompts and references as ids; raises `BadArgument` for any argument that is not what it should be."""
    if metric not in METRICS:
        raise UnknownName(f"no metric is called {metric!r};{did_you_mean(metric, METRICS)}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise BadArgument(f"every={every!r} must be a whole number of rungs >= 1")
    if not 0 < limit <= 1:
        raise BadArgument(f"limit={limit!r} must be a mean loss above 0 and up to 1")
    ids = _ids(prompts, tokenizer, "prompts")
    if references is None:
        return ids, None
    goals = [goal.tolist() for goal in _ids(references, tokenizer, "references")]
    if len(goals) != len(ids):
        raise BadArgument(f"{len(goals)} references for {len(ids)} prompts; give one text for each")
    return ids, goals


def _ids(texts: Any, tokenizer: Any, what: str) -> list[Tensor]:
    """Return each text as int64 [tokens]; raises `BadArgument`."""
    found = list(_each(texts, tokenizer, what))
    if not found:
        _refuse(what, "there is none")
    return found


def _each(texts: Any, tokenizer: Any, what: str) -> Iterator[Tensor]:
    if isinstance(texts, (str, Mapping)):
        _refuse(what, f"{type(texts).__name__} is not a list of them")
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                _refuse(what, "strings need tokenizer=...")
            text = tokenizer(text).input_ids
        ids = torch.as_tensor(text)
        if ids.dim() == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            _refuse(what, f"one has shape {list(ids.shape)} and type {ids.dtype}")
        yield ids.long()


def _refuse(what: str, why: str) -> NoReturn:
    raise BadArgument(f"{what} must be texts as token ids [tokens] or strings, at least one; {why}")
