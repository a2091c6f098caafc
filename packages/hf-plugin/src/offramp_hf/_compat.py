"""Every touch of private or moving API of transformers, and nowhere else."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

# ---- generate -------------------------------------------------------------------------------------------------------

#: arguments of `generate` that are not generation-config entries or model inputs
_GENERATE = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
    "trust_remote_code",
    "tokenizer",
    "assistant_tokenizer",
)
#: what the decoding loop knows how to carry from step to step
_CARRIED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "encoder_outputs"}
_CARRIED |= {"decoder_attention_mask"}
#: logits processors that know which row is which, and what asks for them: they cannot be shown one row at a time
_WHOLE_BATCH = {
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
}
#: logits processors that answer each row from its scores alone, whatever its tokens are
_ALONE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor", "LogitNormalization",
}  # fmt: skip


def named_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return all arguments of `generate` by name, None when they do not fit its signature."""
    if len(args) > 1 + _GENERATE.index("custom_generate") or kwargs.keys() & set(_GENERATE[: len(args)]):
        return None
    return {**dict(zip(_GENERATE, args, strict=False)), **kwargs}


def prepared_config(model: Any, given: Any, kwargs: dict[str, Any]) -> Any:
    """Return the generation config that this call will use."""
    rest = {k: v for k, v in kwargs.items() if k not in _GENERATE}
    return type(model)._prepare_generation_config(model, given, **rest)[0]


def why_not_mode(config: Any, kwargs: dict[str, Any]) -> str | None:
    """Return why this call cannot be decoded early, from its arguments alone; None when it can."""
    from transformers.generation import GenerationMode

    for name in ("custom_generate", "assistant_model", "negative_prompt_ids", "synced_gpus", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return f"{name}="
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return str(mode.value).replace("_", " ")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        return f"cache_implementation={config.cache_implementation!r}"
    if not config.use_cache:
        return "use_cache=False"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "output_attentions or output_hidden_states"
    if config.guidance_scale not in (None, 1):
        return "guidance_scale"
    if config.stop_strings is not None and "stop_strings" not in kwargs and kwargs.get("generation_config") is None:
        return "stop_strings in model.generation_config (pass them to generate)"
    return None


def with_stop_strings(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with `stop_strings` turned into a stopping criterion: the framework forgets the tokenizer
    when it is given a decoding loop."""
    from transformers.generation import StoppingCriteriaList, StopStringCriteria

    if config.stop_strings is None or kwargs.get("tokenizer") is None:
        return kwargs
    kwargs = dict(kwargs)
    tokenizer = kwargs.pop("tokenizer")
    strings = kwargs.pop("stop_strings", None) or config.stop_strings
    given = kwargs.get("generation_config")
    if given is not None and given.stop_strings is not None:
        kwargs["generation_config"] = copy.deepcopy(given)
        kwargs["generation_config"].stop_strings = None
    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    kwargs["stopping_criteria"] = criteria
    return kwargs


def older_tokens(config: Any, inputs: dict[str, Any], ids: Any) -> int:
    """Return how many tokens are in the given cache but not in `ids`."""
    mask = inputs.get("attention_mask")
    if inputs.get("encoder_outputs") is not None:
        return 0
    given: int = ids.shape[1]
    seen: int = getattr(config, "_mask_length", given) if mask is None else mask.shape[1]
    return max(0, seen - given)


def why_not_rope(model: Any, longest: int) -> str | None:
    """Return why positions up to `longest` cannot be decoded early: rotary frequencies that change with the length."""
    text = model.config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    for one in (parameters, *parameters.values()):
        kind = one.get("rope_type", "") if isinstance(one, dict) else ""
        if "dynamic" in kind or kind == "longrope":
            limit = one.get("original_max_position_embeddings") or text.max_position_embeddings
            if longest > limit:
                return f"{kind} rotary scaling past {limit} tokens ({longest}): its frequencies change with the length"
    return None


def why_not_call(config: Any, processors: Any, inputs: dict[str, Any], ids: Any) -> str | None:
    """Return why the prepared inputs cannot be decoded early; None when they can."""
    odd = sorted(k for k, v in inputs.items() if k not in _CARRIED and v is not None)
    if odd:
        return f"model input {odd[0]}"
    if ids.shape[1] == 0 or ids.shape[0] == 0:
        return "an empty prompt or batch"
    for kind in (type(one).__name__ for one in processors):
        if kind == "UnbatchedClassifierFreeGuidanceLogitsProcessor":
            return "guidance_scale"
        if kind == "SynthIDTextWatermarkLogitsProcessor":
            return "a watermark whose processor remembers every call"
        if kind in _WHOLE_BATCH and ids.shape[0] > 1:
            return f"{_WHOLE_BATCH[kind]} with more than one row"
    mask, position = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.dim() != 2:
        return f"an attention_mask of {mask.dim()} dimensions"
    if position is not None and "encoder_outputs" not in inputs:
        length = ids.shape[1] + older_tokens(config, inputs, ids) if mask is None else mask.sum(-1)
        if not bool((position[:, -1] == length - 1).all()):
            return "position_ids that do not count the tokens"
    return None


def processors_of_row(processors: Any, row: int) -> Any:
    """Return the logits processors as they act on one row of the batch: RepetitionPenalty knows the padding of every
    row.
    """
    made = type(processors)(processors)
    for i, one in enumerate(processors):
        known: Any = getattr(one, "prompt_ignore_length", None)
        if getattr(known, "ndim", 0) == 1 and len(known) > 1:
            made[i] = copy.copy(one)
            made[i].prompt_ignore_length = known[row : row + 1]
    return made


def reads_scores_alone(processor: Any) -> bool:
    """Return whether this is a logits processor of the framework that does not look at the tokens."""
    kind = type(processor)
    return kind.__name__ in _ALONE and kind.__module__ == "transformers.generation.logits_process"


def in_turn(processors: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what calls these logits processors one after the other: the framework's list asks for the signature of
    each at every token, 25 microseconds."""
    from transformers import LogitsProcessorList

    kinds = [inspect.signature(one.__call__).parameters for one in processors]
    if type(processors) is not LogitsProcessorList or any(len(kind) > 2 for kind in kinds):
        return processors  # type: ignore[no-any-return]

    def call(ids: Tensor, scores: Tensor) -> Tensor:
        for one in processors:
            scores = one(ids, scores)
        return scores

    return call


def self_cache(inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Return (the cache as the model takes it, the part of it that holds the decoder's own tokens)."""
    cache = inputs.get("past_key_values")
    return cache, getattr(cache, "self_attention_cache", cache)


def with_self_cache(inputs: dict[str, Any], window: Any) -> Any:
    """Return what the model takes as cache, with `window` in the place of the decoder's own part."""
    cache = inputs["past_key_values"]
    if not hasattr(cache, "cross_attention_cache"):
        return window
    from transformers.cache_utils import EncoderDecoderCache

    # filled by the prefill; shallow, so that an error leaves the given one
    cross = copy.copy(cache.cross_attention_cache)
    cross.layers = [copy.copy(layer) for layer in cross.layers]
    return EncoderDecoderCache(window, cross)


def prefill(model: Any, ids: Any, config: Any, inputs: dict[str, Any]) -> Any:
    """Run the framework's own prefill and return logits [batch, n, classes]."""
    return model._prefill(ids, config, inputs).logits


def step_inputs(inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return (the decoder's padding mask [batch, slots] or None, inputs to repeat at every step)."""
    if inputs.get("encoder_outputs") is None:
        return inputs.get("attention_mask"), {}
    again = {k: inputs.get(k) for k in ("encoder_outputs", "attention_mask", "past_key_values")}
    return inputs.get("decoder_attention_mask"), again


def own_loop(
    model: Any, ids: Any, processors: Any, criteria: Any, config: Any, streamer: Any, inputs: dict[str, Any]
) -> Any:
    """Run the framework's own greedy or sampling loop on prepared inputs."""
    return type(model)._sample(
        model,
        ids,
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=config,
        streamer=streamer,
        **inputs,
    )


def output(model: Any, rows: Any, config: Any, inputs: dict[str, Any], cache: Any) -> Any:
    """Return what `generate` returns: ids, or the framework's output object. cache: what the call was given, to be
    filled.
    """
    held = inputs["past_key_values"]
    if hasattr(held, "cross_attention_cache"):
        cache.cross_attention_cache.layers = held.cross_attention_cache.layers
        cache.is_updated = held.is_updated
    ids = rows.result()
    if not config.return_dict_in_generate:
        return ids
    from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

    scores = rows.steps(rows.scores) if rows.keep_scores else None
    logits = rows.steps(rows.logits) if rows.keep_logits else None
    if not model.config.is_encoder_decoder:
        return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=logits, past_key_values=cache)
    return GenerateEncoderDecoderOutput(sequences=ids, scores=scores, logits=logits, past_key_values=cache)
