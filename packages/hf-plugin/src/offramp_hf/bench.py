"""`offramp bench lm`: the measured table of the README."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

import offramp
from offramp.cli import as_dict
from offramp_hf import measure
from offramp_hf.demo import FULL, QUICK, one_thread, study, table
from offramp_hf.prepare import find_testbed

MODELS = ("pycode-5m-layerskip", "pycode-5m")


@one_thread()
def lm(folder: Path, prompts: int, quick: bool, console: Console) -> dict[str, Any]:
    """Measure all ways of generating on both testbed models; fitted exits are shared with the demo in `folder`."""
    settings = QUICK if quick else FULL
    body: dict[str, Any] = {"format": 1, "prompts": prompts, "rows": [], "plain_rows": []}
    for key, name, other in (("rows", *MODELS), ("plain_rows", *MODELS[::-1])):
        source = find_testbed(name)
        found = study(source, find_testbed(other), settings, prompts, folder, console, ("never", "prompt_lookup"))
        body[key] = found.rows
        body[f"{key.removesuffix('rows')}calibration"] = as_dict(found.calibration)
        console.print(table(f"{name}, {prompts} prompts", found.rows))
    body |= origin("offramp bench lm")
    console.print(f"{body['machine']}, {body['date']}", soft_wrap=True)
    return body


def origin(command: str) -> dict[str, str]:
    """Return what a result must name: command, machine, date and version."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"command": command, "machine": measure.machine(), "date": date, "version": offramp.__version__}
