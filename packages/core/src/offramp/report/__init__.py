"""One self-contained HTML file from the JSON of a run: no network, no script, readable on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.report.page import html as html
from offramp.report.page import sections as sections

#: of the JSON that a report is built from
FORMAT = 1
#: what a run's JSON may hold, of which a report needs at least one
PARTS = (
    *("rows", "plain_rows", "certificate", "trace", "text", "exits"),
    *("policies", "calibrators", "exit_scores", "confusion", "images", "runs"),
)


def write(run: Mapping[str, Any], path: str | Path) -> None:
    """Build the page of `run` and write it, atomically."""
    from offramp.checkpoint import write_text

    write_text(Path(path), html(run))


def save(run: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and report.html into `folder`."""
    from offramp.checkpoint import write_text
    from offramp.cli import dump_json

    write_text(folder / "report.json", dump_json(run))
    write(run, folder / "report.html")


def read(path: str | Path) -> dict[str, Any]:
    """Read the JSON of a run; raises `DamagedFile` when it is not one."""
    from offramp.checkpoint import read_json
    from offramp.errors import DamagedFile

    body = read_json(Path(path), FORMAT, ())
    if not any(part in body for part in PARTS):
        raise DamagedFile(
            f"{path} holds nothing to report (none of {', '.join(PARTS)}); make one with: offramp demo lm --out demo, "
            f"or offramp demo classify --out demo"
        )
    return body
