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

import offramp
from offramp import bench_policies
from offramp._registry import lookup
from offramp.bench_policies import calibrations, policy_row
from offramp.cli import as_dict
from offramp.errors import BadArgument
from offramp.report import FORMAT
from offramp.report.curves import summary
from offramp.report.scores import confusion, exit_scores
from offramp_hf.bench import origin
from offramp_hf.classify import Batch, Plan, Study, plan, regated, study
from offramp_hf.classify_tables import tables
from offramp_hf.demo import step

#: the policy whose certificate is shown, and which the calibrators are compared on: of those that need no training of
#: their own it saved most here (46 % of the blocks where confidence saved 44 %)
SHOWN = "margin"
#: what a calibrator that asks for a budget is asked to spend, as a share of the full model's cost
BUDGET = 0.6


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


def on_the_clock(
    done: Study,
    rows: list[dict[str, Any]],
    found: dict[str, offramp.Calibration],
    most: int | None,
    console: Console,
) -> dict[str, Any]:
    """Measure the policies of the rows on the test batches, at most so many; see `offramp.bench_policies`."""
    picked, rows_of = _evenly(done.batches, most)
    return bench_policies.on_the_clock(done.exits, rows, found, picked, done.test[rows_of], console)


def _evenly(batches: Sequence[Batch], most: int | None) -> tuple[list[Batch], list[int]]:
    """Return at most so many batches, evenly over all, which are sorted by length, and their rows of the trace."""
    count = min(len(batches), most or len(batches))
    kept = [i * len(batches) // count for i in range(count)]
    sizes = [len(b["labels"]) for b in batches]
    rows = [sum(sizes[:i]) + j for i in kept for j in range(sizes[i])]
    return [batches[i] for i in kept], rows


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
