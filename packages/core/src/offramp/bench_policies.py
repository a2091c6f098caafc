"""Policies of a classifier at their certified settings: simulated on a trace, and measured on the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp._registry import create, lookup, names
from offramp.attach import Exits
from offramp.calibrate import calibrate
from offramp.calibration import Calibration
from offramp.clock import Clocked, Early, one_thread, quartiles, timed_with_bar
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy, SchedulePolicy
from offramp.risks import losses
from offramp.simulate import simulate
from offramp.trace import UNLABELLED, Trace

#: share of blocks saved from which on a realised saving is told
LEAST = 0.05
#: what data sets call the labels of a batch: left out on the clock, or the model would reckon its loss too
LABELS = ("labels", "y")


class Promise(Protocol):
    """What policies are calibrated to: a risk, its bound, and how often the bound may fail."""

    @property
    def risk(self) -> str:
        """Name of the risk."""

    @property
    def alpha(self) -> float:
        """Bound on it."""

    @property
    def delta(self) -> float:
        """Share of calibrations that may break it."""


def calibrations(trace: Trace, how: Promise, policies: Sequence[str] = ()) -> dict[str, Calibration]:
    """Return the calibration of each policy of a single pass by name; one that cannot be calibrated says why.

    policies: names, empty for all that exist. Raises `UnknownName`.
    """
    found = {}
    for name in policies or names(ExitPolicy):
        if issubclass(lookup(ExitPolicy, name), SchedulePolicy):
            continue  # it says which blocks of a token run, and asks no exit
        try:
            found[name] = calibrate(trace, name, risk=how.risk, alpha=how.alpha, delta=how.delta)
        except BadArgument as error:
            found[name] = Calibration(create(ExitPolicy, "never"), None, f"uncertified: {error}")
    return found


def policy_row(name: str, made: Calibration, trace: Trace, risk: str) -> dict[str, Any]:
    """Return what a calibrated policy does to the rows of a trace; risk: what the promise is about, measured here;
    bound: the speed if only blocks took time.
    """
    row: dict[str, Any] = {"name": name, "policy": made.policy.config(), "certified": made.certificate is not None}
    if made.certificate is None and name != "never":
        return {**row, "note": made.note.removeprefix("uncertified: ")}
    out = simulate(trace, made.policy)
    shares = {"accuracy": out.accuracy, "agreement": out.agreement, "saved": out.saved}
    shares["risk"] = float(losses(trace, out.columns, risk).mean())
    return {**row, **shares, "cost_mean": out.cost_mean, "bound": 1 / (1 - out.saved) if out.saved < 1 else None}


class Leaving(Early):
    """A policy enabled outside the clock; a call returns logits [rows, classes] and the depths [rows] they are from."""

    def __init__(self, exits: Exits, policy: ExitPolicy) -> None:
        super().__init__(exits.model, policy)
        self.full = Full(exits)

    def __call__(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the model."""
        return self.full(inputs), self.stats.last_depths


class Full:
    """The model's own call; returns logits [rows, classes]."""

    def __init__(self, exits: Exits) -> None:
        self.backbone = exits.backbone

    def __call__(self, inputs: Any) -> Tensor:
        """Run the model."""
        output = self.backbone.call(inputs)
        logits: Tensor = getattr(output, "logits", output)
        return logits


@one_thread()
@torch.no_grad()
def on_the_clock(
    exits: Exits,
    rows: list[dict[str, Any]],
    found: Mapping[str, Calibration],
    batches: Sequence[Mapping[str, Tensor]],
    trace: Trace,
    console: Any,
) -> dict[str, Any]:
    """Run each row's policy and the full model over the same batches, interleaved, and add to the rows what came out.

    batches: with labels; trace: what exits said of their rows, in order. Adds seconds, rows_per_second, speedup (and
    quartiles of the ratios batch by batch), exits, live_accuracy, moved (rows that left elsewhere than simulated) and
    realised: time saved over what the skipped blocks would have cost, which is each block's measured time in the full
    model times the share of rows that had left before it.
    """
    items = [{k: v for k, v in b.items() if k not in LABELS} for b in batches]
    targets = torch.cat([next(b[k] for k in LABELS if k in b) for b in batches])
    sizes = [len(next(iter(b.values()))) for b in batches]
    full = Full(exits)
    clock = Clocked(exits.backbone.chain().blocks, full)
    early = {row["name"]: Leaving(exits, found[row["name"]].policy) for row in rows if "saved" in row}
    timed = timed_with_bar({"full": full, "clocked": clock, **early}, items, console, "batches")
    spent = [t.seconds for t in timed["full"]]
    for row in rows:
        if row["name"] not in early:
            continue
        mine, depths = timed[row["name"]], simulate(trace, found[row["name"]].policy).depths
        seconds, left = [t.seconds for t in mine], torch.cat([t.result[1] for t in mine])
        ideal = sum(_ideal(*pair) for pair in zip(clock.kept[-len(items) :], depths.split(sizes), strict=True))
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
        "batch": sizes[0],
        "calls": len(items),
        "seconds": sum(spent),
        "rows_per_second": len(targets) / sum(spent),
        "full_accuracy": _accuracy(torch.cat([t.result for t in timed["full"]]), targets),
        "blocks_share": sum(map(sum, clock.kept[-len(items) :])) / sum(t.seconds for t in timed["clocked"]),
    }


def _ideal(blocks: Sequence[float], depths: Tensor) -> float:
    """Return the seconds that the blocks would have cost on the rows that left before them."""
    return sum(t * float((depths <= b).double().mean()) for b, t in enumerate(blocks))


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    known = targets != UNLABELLED
    return float((logits.argmax(-1) == targets)[known].double().mean())
