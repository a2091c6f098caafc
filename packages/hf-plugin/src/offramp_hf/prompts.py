"""Prompts to measure on: lines of a file, or windows of a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.checkpoint import read_bytes
from offramp.errors import BadArgument
from offramp_hf.prepare import Text, ids_of

#: how a file ends that holds one prompt per line
LINES = ".jsonl"


def read_prompts(tokenizer: Any, path: Path, count: int, length: int) -> list[Tensor]:
    """Return up to `count` prompts [1, tokens] of a file.

    A .jsonl file has one prompt per line, a string or an object with "prompt", of which the last `length` tokens are
    kept; of any other text, `count` windows of `length` tokens are taken, evenly spread. Raises `BadArgument`.
    """
    text = read_bytes(path).decode("utf-8", errors="replace")
    if path.suffix != LINES:
        ids = ids_of(tokenizer, text)
        return Text(ids, ids, ids).prompts(count, length)
    found = []
    for n, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            one = json.loads(line)
            prompt = one["prompt"] if isinstance(one, dict) else one
            if not isinstance(prompt, str) or not prompt:
                raise ValueError(f"no text: {prompt!r}")
        except (ValueError, KeyError) as error:
            raise BadArgument(
                f'{path}, prompt {n} is neither a JSON string nor an object with a "prompt" ({error!r}); write e.g. '
                f'{{"prompt": "def main("}}'
            ) from error
        found.append(ids_of(tokenizer, prompt)[None, -length:])
    if not found:
        raise BadArgument(f"{path} holds no prompt; write one JSON string per line")
    return found[:count]


def batches(prompts: Sequence[Tensor], size: int) -> list[Tensor]:
    """Return prompts [size, tokens] in groups of `size`; raises `BadArgument` when lengths in a group differ."""
    out = []
    for i in range(0, len(prompts) - size + 1, size):
        group = list(prompts[i : i + size])
        lengths = sorted({p.shape[1] for p in group})
        if len(lengths) > 1:
            raise BadArgument(f"--batch {size} needs prompts of equal length, these have {lengths} tokens; give a text")
        out.append(torch.cat(group))
    if not out:
        raise BadArgument(f"{len(prompts)} prompts do not fill one batch of {size}; give more")
    return out
