"""`offramp demo classify`: fine-tune a real encoder with exits, certify a policy, measure it, and write a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from offramp.cli import as_dict
from offramp.report.words import percent, promise
from offramp_hf.bench_classify import SHOWN, Ask, body_of, calibrations
from offramp_hf.classify import plan, study
from offramp_hf.classify_tables import tables
from offramp_hf.demo import step, write_report


def run(folder: Path, quick: bool, size: int, console: Console) -> dict[str, Any]:
    """Write report.json and report.html into `folder`, and return what the JSON holds."""
    how = plan(quick)
    done = study(how, folder, size, console)
    with step(console, f"calibrate {SHOWN}: {how.risk} at most {percent(how.alpha)}"):
        found = calibrations(done.calibration, how, (SHOWN, "never"))
    shown = as_dict(found[SHOWN])
    console.print(promise(shown["certificate"], shown["note"]), soft_wrap=True)
    body = body_of(done, how, found, Ask(folder, quick, size), console)
    body |= {"command": "offramp demo classify" + (" --quick" if quick else ""), **told(body)}
    with step(console, "write the report"):
        write_report(body, folder)
    console.print(tables(body)[0])
    return body


def told(body: dict[str, Any]) -> dict[str, Any]:
    """Return the summary and the tiles of the page."""
    row = next(r for r in body["policies"] if r["name"] == SHOWN)
    full = body["clock"]["full_accuracy"]
    if "speedup" not in row:
        return {"summary": f"Nothing could be certified, so every row runs the whole model ({full:.1%} accurate)."}
    said = (
        f"{body['model']}, classifies {body['data']}. Calibrated, it is right on {row['live_accuracy']:.1%} of them "
        f"(full model: {full:.1%}), skips {row['saved']:.0%} of the blocks and is {row['speedup']:.2f} times as fast."
    )
    tiles = [
        ("measured", f"{row['speedup']:.2f}×", f"throughput, batch {body['clock']['batch']}"),
        ("accuracy", f"{row['live_accuracy']:.1%}", f"full model: {full:.1%}"),
    ]
    return {"summary": said, "tiles": tiles}
