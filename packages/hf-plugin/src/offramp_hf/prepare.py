"""What the demo and the benchmark start from: a model, text split in three, fitted exits, a trace and a calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import offramp
from offramp.checkpoint import read_bytes, write_text
from offramp.enable import paused
from offramp.errors import BadArgument, DamagedFile
from offramp.record import track

#: where the testbed models lie in a checkout, and the text that neither has seen
ASSETS, HELDOUT = Path("tests") / "assets", "heldout.txt"
#: beside fitted exits: the settings they were fitted with
RECORD = "fitted.json"


@dataclass(frozen=True)
class Settings:
    """How exits are made, fitted and calibrated, and what is generated.

    at: depths for a model of 12 blocks, scaled for others; own: prompts whose continuations (own_tokens each, the first
    half greedy, the rest sampled) the heads are fitted on; windows of `window` tokens give one calibration row each.
    """

    at: tuple[int, ...]
    head: str
    config: tuple[tuple[str, Any], ...]
    threshold: float
    own: int
    own_tokens: int
    steps: int
    rows: int
    lr: float
    windows: int
    window: int
    alpha: float = 0.05
    delta: float = 0.05
    prompt_tokens: int = 64
    new_tokens: int = 96
    seed: int = 0

    def fitting(self) -> dict[str, Any]:
        """Return what the fitted heads depend on; a change of anything else reuses them."""
        names = ("at", "head", "config", "own", "own_tokens", "steps", "rows", "lr", "prompt_tokens", "seed")
        found: dict[str, Any] = json.loads(json.dumps({k: v for k, v in asdict(self).items() if k in names}))
        return found


def find_testbed(name: str) -> Path:
    """Return the testbed model `name`, looked for upwards from here and from the source; raises `BadArgument`."""
    places = [Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents]
    for place in places:
        if (place / ASSETS / name / "config.json").is_file():
            return place / ASSETS / name
    raise BadArgument(
        f"the testbed model {name!r} was not found in {ASSETS} above {Path.cwd()}; run this in a checkout of offramp, "
        f"or name a model: offramp demo lm --model DIR --plain DIR"
    )


def load(source: str | Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) in float32 and eval mode; raises `DamagedFile` when there is no such model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for reading 10 MB hides the ones that matter
    logging.set_verbosity_error()  # the framework's own early-exit drafting warns about how the framework calls itself
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{source} is not a causal language model that transformers can load: {error}") from error
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return model, tokenizer


def heldout(folder: Path, fallback: Path) -> str:
    """Return the held-out text beside a model, or beside the other one; raises `BadArgument`."""
    for place in (folder, fallback):
        if (place / HELDOUT).is_file():
            return (place / HELDOUT).read_text(encoding="utf-8")
    raise BadArgument(f"there is no {HELDOUT} in {folder}; put text there that the model was not trained on")


def ids_of(tokenizer: Any, text: str) -> Tensor:
    """Return all tokens of a text, int64 [tokens], without special tokens."""
    found: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    return found


def windows(tokenizer: Any, files: Sequence[Path], length: int) -> Tensor:
    """Return the text of files cut into windows [n, length] without overlap; raises `DamagedFile`, `BadArgument`."""
    text = "\n".join(read_bytes(path).decode("utf-8", errors="replace") for path in files)
    ids = ids_of(tokenizer, text)
    if len(ids) < length:
        raise BadArgument(f"the text has {len(ids)} tokens, less than one window of {length}; give more text")
    return ids[: len(ids) // length * length].view(-1, length)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; a character that spans tokens belongs to its last one."""
    out, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        whole = text.rstrip("\ufffd") if end < len(ids) else text
        out.append(whole[len(before) :])
        before = whole
    return out


@dataclass(frozen=True)
class Text:
    """Held-out tokens in three parts that share nothing: the first quarter is for fitting, half for calibration, the
    last quarter for evaluation."""

    fit: Tensor
    calibrate: Tensor
    evaluate: Tensor

    @classmethod
    def split(cls, ids: Tensor) -> Text:
        """Cut at one quarter and at three quarters."""
        n = len(ids)
        return cls(ids[: n // 4], ids[n // 4 : 3 * n // 4], ids[3 * n // 4 :])

    def prompts(self, count: int, length: int) -> list[Tensor]:
        """Return `count` evaluation prompts [1, length], evenly spread."""
        room = len(self.evaluate) - length
        if room < count * length // 4:
            raise BadArgument(f"the held-out text is too short for {count} prompts of {length} tokens; ask for fewer")
        starts = [i * room // max(1, count) for i in range(count)]
        return [self.evaluate[s : s + length][None] for s in starts]

    def windows(self, count: int, length: int) -> Tensor:
        """Return up to `count` calibration windows [n, length] that do not overlap, evenly spread."""
        whole = self.calibrate[: len(self.calibrate) // length * length].view(-1, length)
        if len(whole) <= count:
            return whole
        return whole[torch.arange(count) * len(whole) // count]


def scaled(at: Sequence[int], depth: int) -> list[int]:
    """Return depths meant for a model of 12 blocks as depths for one of `depth` blocks."""
    return sorted({min(depth - 1, max(1, round(d * depth / 12))) for d in at})


def own_output(model: Any, text: Tensor, settings: Settings, progress: bool = True) -> Tensor:
    """Return the model's own continuations of random places of `text`: ids [own, prompt + own_tokens]."""
    draw = torch.Generator().manual_seed(settings.seed)
    starts = torch.randint(0, max(1, len(text) - settings.prompt_tokens), (settings.own,), generator=draw)
    prompts = torch.stack([text[s : s + settings.prompt_tokens] for s in starts.tolist()])
    size, out = 64, []
    with paused(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        parts = list(prompts.split(size))
        for i, part in enumerate(track(parts, "own output", progress, len(parts))):
            out.append(
                model.generate(
                    part,
                    attention_mask=torch.ones_like(part),
                    max_new_tokens=settings.own_tokens,
                    do_sample=2 * i >= len(parts) and len(parts) > 1,
                    top_k=0,
                    eos_token_id=None,
                )
            )
    return torch.cat(out)


def digest(folder: Path) -> str:
    """Return the sha256 of a model directory's weights."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(read_bytes(path))
    return found.hexdigest()


def fitted(model: Any, source: Path, text: Text, settings: Settings, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return (exits attached and fitted, what the fit said).

    Read from `folder` when that was made with the same settings, else fitted on the model's own output and saved there.
    """
    wanted = {"settings": settings.fitting(), "model": digest(source)}
    try:
        kept = json.loads(read_bytes(folder / RECORD))
        if {k: kept.get(k) for k in wanted} == wanted:
            return offramp.load(model, folder), {**kept["fit"], "reused": True}
    except (DamagedFile, ValueError, KeyError, AttributeError):
        pass  # nothing usable there: fit anew and replace it
    depth = model.config.get_text_config().num_hidden_layers
    exits = offramp.attach(model, scaled(settings.at, depth), settings.head, **dict(settings.config))
    data = own_output(model, text.fit, settings)
    report = offramp.fit(model, data, steps=settings.steps, rows=settings.rows, lr=settings.lr, seed=settings.seed)
    said = {"before": _keys(report.before), "agreement": _keys(report.agreement), "seconds": report.seconds}
    exits.save(folder)
    write_text(folder / RECORD, json.dumps({**wanted, "fit": said}, indent=2))
    return exits, {**said, "reused": False}


def _keys(values: dict[int, float]) -> dict[str, float]:
    return {str(k): v for k, v in values.items()}


def calibrated(model: Any, text: Text, settings: Settings) -> tuple[Any, Any]:
    """Return (trace, calibration) of `confidence` on held-out windows, one row of each."""
    ids = text.windows(settings.windows, settings.window)
    data = {"input_ids": ids, "labels": ids}
    trace = offramp.record(model, data, batch_size=32, per_row=1, seed=settings.seed, progress=True)
    return trace, offramp.calibrate(trace, "confidence", alpha=settings.alpha, delta=settings.delta)
