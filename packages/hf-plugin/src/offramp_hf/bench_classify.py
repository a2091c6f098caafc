"""`offramp bench classify`: every policy at its certified setting, simulated and on the clock, and what exits know."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import offramp
from offramp._registry import lookup
from offramp.cli import as_dict
from offramp.clock import Clocked, Early, quartiles
from offramp.errors import BadArgument
from offramp.policy import SchedulePolicy
from offramp.report import FORMAT
from offramp.report.curves import summary
from offramp.report.scores import confusion, exit_scores
from offramp.risks import losses
from offramp.trace import UNLABELLED
from offramp_hf.bench import origin
from offramp_hf.classify import Batch, Plan, Study, plan, regated, study
from offramp_hf.classify_tables import tables
from offramp_hf.demo import one_thread, step, timed_with_bar

#: the policy whose certificate is shown, and which the calibrators are compared on: of those that need no training of
#: their own it saved most here (46 % of the blocks where confidence saved 44 %)
SHOWN = "margin"
#: what a calibrator that asks for a budget is asked to spend, as a share of the full model's cost
BUDGET = 0.6
#: share of blocks saved from which on a realised saving is told
LEAST = 0.05


@dataclass(frozen=True)
class Ask:
    """What to measure. folder: of the fitted classifier; sample: take the kept sample in any case; size: rows per
    batch; policies: names, empty for all; batches: at most so many on the clock, None for all.
    """

    folder: Path
    quick: bool = False
    sample: bool = False
    size: int = 64
    policies: tuple[str, ...] = ()
    batches: int | None = None


def classify(ask: Ask, console: Console) -> dict[str, Any]:
    """Measure, print the tables and return plain JSON values, from which `offramp report` makes a page."""
    how = plan(ask.quick, ask.sample)
    done = study(how, ask.folder, ask.size, console)
    with step(console, "calibrate every policy"):
        found = calibrations(done.calibration, how, ask.policies)
    body = body_of(done, how, found, ask, console)
    rows = other_gates(done, how, ask, console)
    again = {row["name"] for row in rows}
    body["policies"] = [row for row in body["policies"] if row["name"] not in again] + rows
    for one in tables(body):
        console.print(one)
    console.print(f"{body['machine']}, {body['date']}; data: {body['data']}", soft_wrap=True)
    return body


def other_gates(done: Study, how: Plan, ask: Ask, console: Console) -> list[dict[str, Any]]:
    """Return the rows of policies that read a gate of another kind, each kind fitted beside the same exits in turn."""
    found: list[dict[str, Any]] = []
    first = done.exits.gate
    for gate in offramp.names(offramp.ExitGate):
        wanted = asking(gate, ask.policies)
        if gate == first or not wanted:
            continue
        with step(console, f"fit gate {gate!r} and record"):
            done = regated(done, gate, how)
        made = calibrations(done.calibration, how, wanted)
        rows = [policy_row(name, cal, done.test, how.risk) for name, cal in made.items()]
        on_the_clock(done, rows, made, ask.batches, console)
        found += rows
    return found


def asking(gate: str, chosen: Sequence[str]) -> list[str]:
    """Return the policies, of those chosen (empty: of all), whose own statistic is this gate's."""
    policies = {name: lookup(offramp.ExitPolicy, name) for name in chosen or offramp.names(offramp.ExitPolicy)}
    statistic = lookup(offramp.ExitGate, gate).statistic
    return [name for name, policy in policies.items() if statistic in policy.needs]


def body_of(
    done: Study, how: Plan, found: dict[str, offramp.Calibration], ask: Ask, console: Console, verb: str = "bench"
) -> dict[str, Any]:
    """Measure the calibrated policies and return the JSON of a run; verb: of the command that asked."""
    rows = [policy_row(name, cal, done.test, how.risk) for name, cal in found.items()]
    with step(console, "measure on the clock"):
        clock = on_the_clock(done, rows, found, ask.batches, console)
    name = SHOWN if SHOWN in found else next(iter(found))
    made = as_dict(found[name])
    chosen = found[name] if made["certificate"] is not None else None
    live = next((row for row in rows if row["name"] == name and row.get("exits")), None)
    body = {
        "format": FORMAT,
        "unit": "row",
        "title": "Early exit on package descriptions",
        "model": "MiniLM (6 blocks, width 384), fine-tuned with exits at " + ", ".join(map(str, done.exits.at)),
        "data": f"{len(done.test):,} held-out Debian descriptions in {len(done.names)} sections, {done.source}",
        **made,
        "trace": summary(done.test, chosen, None),
        "policies": rows,
        "exits": {f"{name}, calibrated": live["exits"]} if live else {},
        "exit_scores": exit_scores(done.test),
        "confusion": confusion(done.test),
        "calibrators": calibrator_rows(done, how),
        "clock": clock,
        "fit": done.fit,
        "settings": dataclasses.asdict(how),
        **origin(f"offramp {verb} classify" + " --quick" * ask.quick + " --sample" * ask.sample),
    }
    return {**body, **told(body)}


def told(body: dict[str, Any]) -> dict[str, Any]:
    """Return the summary and the tiles of the page."""
    row = next((r for r in body["policies"] if r["name"] == SHOWN), body["policies"][0])
    full = body["trace"]["full_accuracy"]
    if "speedup" not in row:
        return {"summary": f"Nothing could be certified, so every row runs the whole model ({full:.1%} accurate)."}
    said = (
        f"{body['model']}, classifies {body['data']}. Calibrated, it is right on {row['accuracy']:.1%} of them "
        f"(full model: {full:.1%}), skips {row['saved']:.0%} of the blocks and is {row['speedup']:.2f} times as fast."
    )
    tiles = [
        ("measured", f"{row['speedup']:.2f}×", f"throughput, batch {body['clock']['batch']}"),
        ("accuracy", f"{row['accuracy']:.1%}", f"full model: {full:.1%}"),
    ]
    return {"summary": said, "tiles": tiles}


def calibrations(trace: offramp.Trace, how: Plan, policies: Sequence[str] = ()) -> dict[str, offramp.Calibration]:
    """Return the calibration of each policy of a single pass by name; one that cannot be calibrated says why.

    policies: names, empty for all that exist. Raises `UnknownName`.
    """
    found = {}
    for name in policies or offramp.names(offramp.ExitPolicy):
        if issubclass(lookup(offramp.ExitPolicy, name), SchedulePolicy):
            continue  # it says which blocks of a token run, and asks no exit
        try:
            found[name] = offramp.calibrate(trace, name, risk=how.risk, alpha=how.alpha, delta=how.delta)
        except BadArgument as error:
            found[name] = offramp.Calibration(offramp.policy("never"), None, f"uncertified: {error}")
    return found


def policy_row(name: str, made: offramp.Calibration, trace: offramp.Trace, risk: str) -> dict[str, Any]:
    """Return what a calibrated policy does to the rows of a trace; risk: what the promise is about, measured here;
    bound: the speed if only blocks took time.
    """
    row: dict[str, Any] = {"name": name, "policy": made.policy.config(), "certified": made.certificate is not None}
    if made.certificate is None and name != "never":
        return {**row, "note": made.note.removeprefix("uncertified: ")}
    out = offramp.simulate(trace, made.policy)
    shares = {"accuracy": out.accuracy, "agreement": out.agreement, "saved": out.saved}
    shares["risk"] = float(losses(trace, out.columns, risk).mean())
    return {**row, **shares, "cost_mean": out.cost_mean, "bound": 1 / (1 - out.saved) if out.saved < 1 else None}


class Leaving(Early):
    """A policy enabled outside the clock; a call returns logits [rows, classes] and the depths [rows] they are from."""

    def __call__(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the model."""
        logits: Tensor = self.model(**inputs).logits
        return logits, self.stats.last_depths


@one_thread()
@torch.no_grad()
def on_the_clock(
    done: Study,
    rows: list[dict[str, Any]],
    found: dict[str, offramp.Calibration],
    most: int | None,
    console: Console,
) -> dict[str, Any]:
    """Run each row's policy and the full model over the same batches, interleaved, and add to the rows what came out.

    Adds seconds, rows_per_second, speedup (and quartiles of the ratios batch by batch), exits, live_accuracy, moved
    (rows that left elsewhere than simulated) and realised: time saved over what the skipped blocks would have cost,
    which is each block's measured time in the full model times the share of rows that had left before it.
    """
    picked, rows_of = _evenly(done.batches, most)
    batches: list[Batch] = [{k: v for k, v in b.items() if k != "labels"} for b in picked]
    tested = done.test[rows_of]

    def full(one: Batch) -> Tensor:
        logits: Tensor = done.model(**one).logits
        return logits

    clock = Clocked(done.exits.backbone.blocks, full)
    early = {row["name"]: Leaving(done.model, found[row["name"]].policy) for row in rows if "saved" in row}
    timed = timed_with_bar({"full": full, "clocked": clock, **early}, batches, console, "batches")
    targets = torch.cat([b["labels"] for b in picked])
    spent = [t.seconds for t in timed["full"]]
    for row in rows:
        if row["name"] not in early:
            continue
        mine, policy = timed[row["name"]], found[row["name"]].policy
        depths = offramp.simulate(tested, policy).depths
        seconds, left = [t.seconds for t in mine], torch.cat([t.result[1] for t in mine])
        ideal = sum(_ideal(*pair) for pair in zip(clock.kept[-len(batches) :], _parts(depths, batches), strict=True))
        row |= {
            "seconds": sum(seconds),
            "rows_per_second": len(targets) / sum(seconds),
            "speedup": sum(spent) / sum(seconds),
            "speedup_quartiles": quartiles([a / b for a, b in zip(spent, seconds, strict=True)]),
            "exits": {str(d): int((left == d).sum()) for d in left.unique().tolist()},
            "moved": int((left != depths).sum()),
            "live_accuracy": _accuracy(torch.cat([t.result[0] for t in mine]), targets),
            # where next to nothing is saved, the noise of the clock would be most of it
            "realised": (sum(spent) - sum(seconds)) / ideal if row["saved"] >= LEAST else None,
        }
    return {
        "batch": len(batches[0]["input_ids"]),
        "calls": len(batches),
        "seconds": sum(spent),
        "rows_per_second": len(targets) / sum(spent),
        "full_accuracy": _accuracy(torch.cat([t.result for t in timed["full"]]), targets),
        "blocks_share": sum(map(sum, clock.kept[-len(batches) :])) / sum(t.seconds for t in timed["clocked"]),
    }


def _evenly(batches: Sequence[Batch], most: int | None) -> tuple[list[Batch], list[int]]:
    """Return at most so many batches, evenly over all, which are sorted by length, and their rows of the trace."""
    count = min(len(batches), most or len(batches))
    kept = [i * len(batches) // count for i in range(count)]
    sizes = [len(b["labels"]) for b in batches]
    rows = [sum(sizes[:i]) + j for i in kept for j in range(sizes[i])]
    return [batches[i] for i in kept], rows


def _parts(depths: Tensor, batches: Sequence[Batch]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = depths.split([len(b["input_ids"]) for b in batches])
    return parts


def _ideal(blocks: Sequence[float], depths: Tensor) -> float:
    """Return the seconds that the blocks would have cost on the rows that left before them."""
    return sum(t * float((depths <= b).double().mean()) for b, t in enumerate(blocks))


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    known = targets != UNLABELLED
    return float((logits.argmax(-1) == targets)[known].double().mean())


def calibrator_rows(done: Study, how: Plan) -> list[dict[str, Any]]:
    """Return what each calibrator makes of one policy: setting, certified or not, and what it does on other rows."""
    rows = []
    for method in offramp.names(offramp.Calibrator):
        kind, policy = lookup(offramp.Calibrator, method), SHOWN
        options, risk = inspect.signature(kind).parameters, how.risk
        if kind.own_risk:  # it bounds what it says itself, of a policy as it is
            risk, policy = kind.risk, lookup(offramp.ExitPolicy, SHOWN).example(done.exits.at, len(done.names))
        cost = float(torch.as_tensor(done.calibration.costs)[-1])
        more = {"budget": BUDGET * cost} if "budget" in options else {}
        try:
            made = offramp.calibrate(
                done.calibration, policy, method=method, risk=risk, alpha=how.alpha, delta=how.delta, **more
            )
            rows.append({"name": method, **as_dict(made), **_outcome(done.test, made)})
        except BadArgument as error:  # e.g. a method that needs what this trace does not hold
            rows.append({"name": method, "policy": None, "certificate": None, "note": str(error)})
    return rows


def _outcome(trace: offramp.Trace, made: offramp.Calibration) -> dict[str, Any]:
    out = offramp.simulate(trace, made.policy)
    return {"accuracy": out.accuracy, "agreement": out.agreement, "saved": out.saved, "cost_mean": out.cost_mean}
