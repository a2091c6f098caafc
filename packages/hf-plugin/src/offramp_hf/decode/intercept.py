"""Take over `model.generate`: the framework prepares and checks everything, the windowed decoder runs the loop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from offramp.enable import Run, make_policy, parse_flag, paused
from offramp.errors import BadArgument, OfframpError
from offramp.options import Options
from offramp.policy import ExitPolicy
from offramp_hf import _compat
from offramp_hf.cache import WindowCache, borrowed, why_not
from offramp_hf.decode.choose import Chooser
from offramp_hf.decode.early import Early
from offramp_hf.decode.rows import Rows
from offramp_hf.decode.schedule import Schedule
from offramp_hf.decode.verified import Verified


class Unsupported(OfframpError, RuntimeError):
    """What was asked cannot be decoded early, and `strict=True` forbids the full model."""


class Generation:
    """The hook on `model.generate`; a bound method is installed, so a deep copy of the model has its own."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model: Any = run.model
        self.warned: set[str] = set()

    def install(self) -> Any:
        """Put `generate` on the instance; returns the undo."""
        check_rule(self.run)
        self.previous = self.model.__dict__.get("generate")
        self.original = self.model.generate
        self.model.__dict__["generate"] = self.generate
        return self.uninstall

    def uninstall(self) -> None:
        """Put back exactly what was there."""
        if self.previous is None:
            self.model.__dict__.pop("generate", None)
        else:
            self.model.__dict__["generate"] = self.previous

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the framework's method does, early where the policy allows it; same arguments, same return."""
        run = self.run
        named = _compat.named_arguments(args, kwargs)
        if named is None:  # too many, or one given twice: the framework's own error
            return self.original(*args, **kwargs)
        given = named.get("generation_config")
        flag = getattr(given, "early_exit", None)
        policy, options = (run.policy, run.options) if flag is None else self.override(flag)
        if run.paused or getattr(type(policy), "name", "") == "never":
            return self.original(*args, **kwargs)
        config = _compat.prepared_config(self.model, given, named)
        reason = _compat.why_not_mode(config, named)
        if reason is not None:
            self.fall_back(reason, options)
            with paused(self.model):  # assisted generation calls `generate` of this very model for its drafts
                return self.original(*args, **kwargs)
        call = Call(self, policy, options, named.get("streamer"))
        return self.original(**{**_compat.with_stop_strings(config, named), "custom_generate": call.decode})

    def override(self, flag: Mapping[str, Any]) -> tuple[ExitPolicy, Options]:
        """Return policy and options of a per-call `generation_config.early_exit`."""
        config, options, _ = parse_flag(flag)
        return make_policy(config, self.run.exits.at), options

    def fall_back(self, reason: str, options: Options, level: int = 3) -> None:
        """Say once why the full model runs, or raise with `strict=True`. level: frames up to the user's line."""
        message = f"early exit is off for this call: {reason}; the full model generates"
        if options.strict:
            raise Unsupported(f"{reason} cannot be decoded early, and strict=True forbids the full model")
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(message, UserWarning, stacklevel=level)


class Call:
    """One `generate` call: the loop that the framework calls in place of its own."""

    def __init__(self, owner: Generation, policy: ExitPolicy, options: Options, streamer: Any) -> None:
        self.owner, self.streamer = owner, streamer
        run = owner.run
        self.run = run
        if policy is not run.policy or options is not run.options:
            self.run = Run(run.exits, policy, options)
            check_rule(self.run)
            self.run.stats, self.run.memory = run.stats, run.memory

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Run the loop; the arguments are those of the framework's own sampling loop."""
        backbone, longest = self.run.backbone, generation_config.max_length
        whole, cache = _compat.self_cache(model_kwargs)
        reason = _compat.why_not_call(generation_config, logits_processor, model_kwargs, input_ids)
        held = longest + _compat.older_tokens(generation_config, model_kwargs, input_ids)
        reason = reason or _compat.why_not_rope(model, held) or why_not(cache, backbone.depth, held)
        wanted = generation_config.return_dict_in_generate or getattr(whole, "_is_user_defined", False)
        if wanted and self.run.options.kv == "schedule":
            reason = reason or "a cache to keep (past_key_values, return_dict_in_generate) with skipped blocks missing"
        if reason is not None:
            self.owner.fall_back(reason, self.run.options, 7)
            return _compat.own_loop(
                model, input_ids, logits_processor, stopping_criteria, generation_config, self.streamer, model_kwargs
            )
        keep = [
            bool(generation_config.return_dict_in_generate and f)
            for f in (generation_config.output_scores, generation_config.output_logits)
        ]
        rows = Rows(input_ids, stopping_criteria, longest, generation_config._pad_token_tensor, self.streamer, keep)
        chooser = Chooser(logits_processor, generation_config.do_sample)
        with borrowed(cache, backbone.depth, wanted) as window:
            model_kwargs["past_key_values"] = _compat.with_self_cache(model_kwargs, window)
            self.loop(model, rows, chooser, generation_config, model_kwargs, window, wanted)
        self.count(rows)
        return _compat.output(model, rows, generation_config, model_kwargs, whole)

    def loop(
        self,
        model: Any,
        rows: Rows,
        chooser: Chooser,
        config: Any,
        inputs: dict[str, Any],
        cache: WindowCache,
        wanted: bool,
    ) -> None:
        """Prefill with the full model, take the first token from it, then decode in windows.

        wanted: whether someone looks at the cache afterwards, so that it has to hold every token.
        """
        run = self.run
        backbone: Any = run.backbone
        mixing = [d for d in run.exits.at if type(run.exits[d]).mixes]
        with backbone.chain().capture(mixing) if mixing else nullcontext({}) as states:
            began = perf_counter()
            first = _compat.prefill(model, rows.ids[:, : rows.prompt], config, inputs)[:, -1]
        if run.options.verify and first.device.type == "cpu":
            run.stats.busy += perf_counter() - began
        run.stats.blocks_run += run.backbone.depth * rows.batch
        run.stats.rounds += 1
        scores = chooser.scores(rows.ids[:, : rows.prompt], first)
        rows.commit_all(chooser.pick(scores), [run.backbone.depth] * rows.batch, scores, first.float())
        if rows.done:
            return
        mask, extra = _compat.step_inputs(inputs)
        padded = mask is not None and not bool(mask.all())
        runner = backbone.runner(cache, rows.batch, padded, extra)
        kind = Verified if run.options.verify else Schedule if run.options.kv == "schedule" else Early
        driver = kind(run, rows, chooser, runner, cache, mask if padded else None)
        with runner.running():
            driver.begin(states)
            driver.generate()
            if wanted:
                driver.leave()

    def count(self, rows: Rows) -> None:
        """Add this call to the statistics of the run."""
        stats = self.run.stats
        depths = torch.tensor([d for row in rows.depths for d in row], dtype=torch.long)
        stats.last_depths = depths
        stats.count(depths)
        stats.tokens += depths.numel()
        stats.blocks_full += self.run.backbone.depth * rows.batch * (max(rows.length) - rows.prompt)


def check_rule(run: Run) -> None:
    """Raise `BadArgument` when the draft rule does not fit the exits, or is given where nothing is drafted."""
    check_vocabulary(run)
    if run.options.verify:
        rule, backbone = run.rule, run.backbone
        if rule.branches and not backbone.trees:  # type: ignore[attr-defined]
            raise BadArgument(
                f"draft rule {rule.config()['rule']!r} verifies many continuations in one call, and "
                f"{type(run.model).__name__} cannot be told which token sees which; use draft='confident'"
            )
    elif run.options.draft is not None:
        raise BadArgument(
            f"draft={run.options.draft!r} is for verify=True, which drafts and checks; without it a token is taken as "
            f"the exit gives it: leave draft out, or add verify=True"
        )


def check_vocabulary(run: Run) -> None:
    """Raise `BadArgument` for a draft vocabulary that the model or its exits cannot work with."""
    some, classes = run.options.draft_vocabulary, run.backbone.context().classes
    if some is None:
        return
    most = some if isinstance(some, int) else max(some) + 1
    if most > classes:
        raise BadArgument(f"draft_vocabulary names token {most - 1}, and the model has {classes}: leave it out")
    if run.gate is not None or "gate" in run.policy.statistics():
        raise BadArgument(
            f"draft_vocabulary leaves out tokens that {type(run.policy).__name__}'s gate asks about; leave it out, or "
            f'use policy "confidence"'
        )
    ids = torch.zeros(1, dtype=torch.long, device=next(run.model.parameters()).device)
    for depth in run.exits.at:  # refused here, before anything changes
        run.exits[depth].narrowed(ids)
