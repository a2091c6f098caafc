"""`offramp demo classify`: fine-tune a real encoder with exits, certify a policy, measure it, and write a report."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from offramp.bench_policies import calibrations
from offramp.cli import as_dict, step
from offramp.report import save
from offramp.report.words import percent, promise
from offramp_hf.bench_classify import SHOWN, Ask, body_of
from offramp_hf.classify import plan, study
from offramp_hf.classify_tables import tables


def run(ask: Ask, console: Console) -> dict[str, Any]:
    """Write report.json and report.html into `ask.folder`, and return what the JSON holds."""
    how = plan(ask.quick, ask.sample)
    done = study(how, ask.folder, ask.size, console)
    with step(console, f"calibrate {SHOWN}: {how.risk} at most {percent(how.alpha)}"):
        found = calibrations(done.calibration, how, (SHOWN, "never"))
    shown = as_dict(found[SHOWN])
    console.print(promise(shown["certificate"], shown["note"]), soft_wrap=True)
    body = body_of(done, how, found, ask, console, "demo")
    with step(console, "write the report"):
        save(body, ask.folder)
    console.print(tables(body)[0])
    return body
