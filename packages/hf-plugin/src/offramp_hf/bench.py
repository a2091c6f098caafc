"""`offramp bench lm`: every way of generating on one model, measured against each other; the table of the README."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

import offramp
from offramp import clock
from offramp.checkpoint import read_bytes
from offramp.cli import as_dict
from offramp.clock import one_thread, timed_with_bar
from offramp.errors import BadArgument
from offramp_hf import bench_memory, measure
from offramp_hf.bench_tables import details
from offramp_hf.bench_tide import installed, tide
from offramp_hf.clock import block_share, realised
from offramp_hf.demo import EXTRA, FULL, QUICK, SWEEP, best_layer, make_ways, step, table
from offramp_hf.measure import Generate
from offramp_hf.prepare import Settings, Text, calibrated, find_testbed, fitted, heldout, ids_of, load
from offramp_hf.prompts import LINES, batches, read_prompts
from offramp_hf.settings import Setting, parse_all

MODELS = ("pycode-5m-early", "pycode-5m")


@dataclass(frozen=True)
class Ask:
    """What `offramp bench lm` was asked for.

    prompts: how many batches of `batch` prompts; folder: of fitted exits, shared with the demo; model, exits,
    assistant: directories; text: held-out text or a .jsonl of prompts; settings: `early_exit` dicts as JSON or files,
    a row each; sample: temperature, None for greedy; memory: measure each way's peak memory too.
    """

    prompts: int = 50
    quick: bool = False
    folder: Path = Path("demo")
    model: Path | None = None
    exits: str | None = None
    text: Path | None = None
    assistant: Path | None = None
    settings: tuple[str, ...] = ()
    sample: float | None = None
    batch: int = 1
    new_tokens: int | None = None
    memory: bool = False
    device: str = "cpu"

    def fitting(self) -> Settings:
        """Return how exits are made where none are given, and how many tokens are generated."""
        base = QUICK if self.quick else FULL
        return base if self.new_tokens is None else replace(base, new_tokens=self.new_tokens)


@dataclass
class Subject:
    """A model ready to be measured. text: tokens for fitting and calibration, None with a file of prompts; words: what
    heads may be fitted on, as text, for tide-inference; source, exits_at: what a fresh process loads.
    """

    model: Any
    tokenizer: Any
    text: Text | None
    words: str
    prompts: list[Tensor]
    exits: Any
    source: Path
    exits_at: str | Path


@one_thread()
def lm(ask: Ask, console: Console) -> dict[str, Any]:
    """Measure all ways of generating on one model, or on both testbed models when none is named."""
    given = parse_all(ask.settings)
    for name, value in (("exits", ask.exits), ("text", ask.text), ("assistant", ask.assistant)):
        if value is not None and ask.model is None:
            raise BadArgument(
                f"--{name} {value} goes with a model; write offramp bench lm --model DIR --{name} {value}"
            )
    if ask.model is not None:
        chosen = [("rows", ask.model, ask.model)]
    else:
        first, second = map(find_testbed, MODELS)
        chosen = [("rows", first, second), ("plain_rows", second, first)]
    body: dict[str, Any] = {"format": 1, "prompts": ask.prompts, "rows": []}
    body["asked"] = {k: v for k, v in asdict(ask).items() if k not in ("prompts", "folder")}
    for key, source, other in chosen:
        subject, calibration, rows = one(source, other, ask, given, console)
        body[key] = rows
        body[f"{key.removesuffix('rows')}calibration"] = None if calibration is None else as_dict(calibration)
        title = f"{source.name}, {len(subject.prompts)} prompts"
        console.print(table(title, rows), details(f"{title}: rounds, bound and efficiency", rows))
    body |= origin("offramp bench lm")
    console.print(f"{body['command']}: {body['machine']}, {body['date']}", soft_wrap=True)
    return body


def one(
    source: Path, other: Path, ask: Ask, given: list[Setting], console: Console
) -> tuple[Subject, Any, list[dict[str, Any]]]:
    """Return (subject, calibration or None, rows) of one model."""
    settings, name = ask.fitting(), source.name
    subject = prepare(source, other, ask, settings, console)
    ways = of_settings(given, subject.exits, settings.new_tokens, ask.exits)
    calibration = None
    if subject.text is not None:
        with step(console, f"{name}: record a trace and calibrate"):
            calibration = calibrated(subject.model, subject.text, settings)[1]
    layer = None
    if ask.batch == 1:
        with step(console, f"{name}: find the best layer for assistant_early_exit"):
            layer = best_layer(subject.model, subject.prompts[:SWEEP], settings)
    ways = {**of_framework(subject, settings, calibration, layer, ask), **ways}
    ways = {k: replace(way, sample=ask.sample) for k, way in ways.items()}
    if ask.batch > 1:  # rows end together, so that every row of every way has the same number of tokens
        ways = {k: replace(way, arguments={**way.arguments, "eos_token_id": None}) for k, way in ways.items()}
    if installed():
        with step(console, f"{name}: train the routers of tide-inference"):
            folder = ask.folder / f"tide-{name}"
            made = tide(subject.model, subject.tokenizer, subject.words, folder, settings.new_tokens, ask.sample)
            ways[made.name] = made
    build = partial(bench_memory.from_disk, source, subject.exits_at)
    rows = run(ways, subject.prompts, subject.exits, console, build if ask.memory else None, ask.assistant)
    for row in rows:
        if row["name"] == "assistant_early_exit":
            row["layer"] = layer
    return subject, calibration, rows


def prepare(source: Path, other: Path, ask: Ask, settings: Settings, console: Console) -> Subject:
    """Load a model, its prompts and its exits, which are fitted where none are given."""
    name, text, words = source.name, None, ""
    with step(console, f"{name}: load"):
        model, tokenizer = load(source)
        count = ask.prompts * ask.batch
        if ask.text is not None and ask.text.suffix == LINES:
            prompts = read_prompts(tokenizer, ask.text, count, settings.prompt_tokens)
            words = "\n".join(tokenizer.decode(p[0]) for p in prompts)
        else:
            words = heldout(source, other) if ask.text is None else read_bytes(ask.text).decode(errors="replace")
            text = Text.split(ids_of(tokenizer, words))
            words = tokenizer.decode(text.fit)
            prompts = text.prompts(count, settings.prompt_tokens)
        prompts = [p.to(ask.device) for p in batches(prompts, ask.batch)]
    where: str | Path = ask.exits or ask.folder / f"exits-{name}"
    if ask.exits is not None:
        exits = offramp.load(model, ask.exits)
    elif text is None:
        raise BadArgument(
            f"{ask.text} holds prompts, and exits are fitted on text; name fitted exits: --exits DIR, or give a text"
        )
    else:
        with step(console, f"{name}: attach heads and fit them on the model's own output"):
            exits, fit = fitted(model, source, text, settings, Path(where))
        said = ", ".join(f"depth {d}: {a:.0%}" for d, a in fit["agreement"].items())
        console.print(f"  {'reused fitted exits' if fit['reused'] else 'fitted'}; agrees with the full model at {said}")
    return Subject(model.to(ask.device), tokenizer, text, words, prompts, exits, source, where)


def of_settings(given: list[Setting], exits: Any, new_tokens: int, where: str | None = None) -> dict[str, Generate]:
    """Return a way for every setting; raises `BadArgument` for one that these exits do not fit, before measuring."""
    for setting in given:
        if setting.exits is not None and (where is None or Path(setting.exits).resolve() != Path(where).resolve()):
            raise BadArgument(
                f"setting {setting.text} names exits {setting.exits!r}, and {where or 'others'} are measured; all "
                f"settings of one run share their exits: --exits {setting.exits}"
            )
    return {s.name: Generate(s.name, exits.model, new_tokens, s.policy(exits), s.enabled()) for s in given}


def of_framework(
    subject: Subject, settings: Settings, calibration: Any, layer: int | None, ask: Ask
) -> dict[str, Generate]:
    """Return the ways of the demo and the two-model one; the framework drafts for one row only."""
    every = make_ways(subject.model, settings, calibration or "never", layer or 1, EXTRA)
    if ask.assistant is not None and ask.batch == 1:
        assistant = load(ask.assistant)[0].to(ask.device)
        ours, theirs = (m.config.get_text_config().vocab_size for m in (subject.model, assistant))
        if ours != theirs:
            raise BadArgument(
                f"--assistant {ask.assistant} knows {theirs} tokens and {subject.source} {ours}; they need equal ones"
            )
        every["assisted"] = Generate("assisted", subject.model, settings.new_tokens)
        every["assisted"].arguments = {"assistant_model": assistant}
    if calibration is None:
        del every["calibrated"]
    return {k: way for k, way in every.items() if ask.batch == 1 or not way.foreign}


def run(
    ways: Mapping[str, Generate],
    prompts: list[Tensor],
    exits: Any,
    console: Console,
    build: Any = None,
    assistant: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure the ways, the first of which is plain generation, and return their rows with everything in them."""
    plain = ways["generate"]
    with step(console, f"generate {len(prompts)} continuations in {len(ways)} ways"):
        timed = timed_with_bar(dict(ways), prompts, console)
        rows = measure.rows(list(ways.values()), timed, prompts, exits.backbone.depth)
        share = block_share(plain, replace(plain, new_tokens=1), exits.backbone.blocks, prompts[: 2 * SWEEP])
        peak = {} if build is None else bench_memory.peaks(ways, prompts[0], build, assistant)
    for row in rows:
        # of the two-model way only the large model's blocks could be counted
        if row["blocks_run"] is None and "assistant_model" not in ways[row["name"]].arguments:
            row |= measure.count_blocks(ways[row["name"]], prompts[:SWEEP])
        row |= {"block_share": share, "realised": realised(row, share)}
        if build is not None:
            row["peak_memory"] = peak.get(row["name"])
    console.print(f"  blocks take {share:.0%} of the time of plain generation", style="dim")
    return rows


def origin(command: str) -> dict[str, str]:
    """Return what a result must name: command, machine, date and version."""
    return clock.origin(command, "transformers")
