"""`offramp tune`: search exits, rule and thresholds for one model and its prompts; write the `early_exit` config."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import offramp
from offramp.checkpoint import write_text
from offramp.clock import one_thread
from offramp.errors import BadArgument, OfframpError
from offramp_hf import measure
from offramp_hf.bench import origin
from offramp_hf.demo import step
from offramp_hf.measure import Generate
from offramp_hf.pareto import Point, front, hopeless
from offramp_hf.prepare import load
from offramp_hf.prompts import read_prompts
from offramp_hf.settings import Setting
from offramp_hf.tune_space import POLICIES, Space


@dataclass(frozen=True)
class Search:
    """What is searched for. lossless: verified settings only; agreement: least agreement of what is written, where
    lossy ones are allowed; policies: names to choose from; count, length: prompts per trial and their tokens.
    """

    trials: int = 40
    minutes: float | None = None
    lossless: bool = True
    agreement: float = 0.95
    policies: tuple[str, ...] = ()
    count: int = 8
    length: int = 64
    new_tokens: int = 64
    seed: int = 0


def optuna() -> Any:
    """Return the module optuna; raises `OfframpError` with the line to run when it is missing."""
    try:
        import optuna as found
    except ModuleNotFoundError as error:
        raise OfframpError(
            f"offramp tune searches with optuna ({error}); run: pip install 'offramp-hf[tune]'"
        ) from None
    found.logging.set_verbosity(found.logging.WARNING)
    return found


@one_thread()
def search(source: Path, where: str, prompts: Path, out: Path, wanted: Search, console: Console) -> dict[str, Any]:
    """Try settings, print the Pareto front of speed and agreement, and write the fastest that agrees enough to `out`.

    Where nothing is faster than plain generation, that is `never`. Exits that the best setting does not use are left
    out of a copy beside `out`. Raises `OfframpError` without optuna, `BadArgument`, `DamagedFile`.
    """
    module = optuna()
    if not 0 <= wanted.agreement <= 1:
        raise BadArgument(f"--agreement {wanted.agreement} is no share of tokens; write e.g. --agreement 0.95")
    with step(console, f"{source}: load"):
        model, tokenizer = load(source)
        items = read_prompts(tokenizer, prompts, wanted.count, wanted.length)
        exits = offramp.load(model, where)
    space = Space(exits, wanted.policies or POLICIES, wanted.lossless)
    trials = Trials(space, items, wanted.new_tokens)
    study = module.create_study(
        directions=["maximize", "maximize"], sampler=module.samplers.TPESampler(seed=wanted.seed)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False) as bar:
        task = bar.add_task("trials", total=wanted.trials)

        def advance(*args: Any) -> None:
            best = max(p.speed for p in trials.points)
            bar.update(task, advance=1, description=f"trials, best {best:.2f}x, {trials.pruned} dropped")
            bar.refresh()

        study.optimize(
            trials.objective,
            n_trials=wanted.trials,
            timeout=None if wanted.minutes is None else 60 * wanted.minutes,
            callbacks=[advance],
        )
    found = front(trials.points)
    best = next(p for p in found if p.agreement >= (1.0 if wanted.lossless else wanted.agreement))
    flag = space.written(best.flag, where, out)
    write_text(out, json.dumps(flag, indent=2))
    console.print(front_table(found, best))
    if best.flag["policy"] == "never":
        console.print("no setting was faster than plain generation; what is written never exits")
    body: dict[str, Any] = {"format": 1, "early_exit": flag, "front": [asdict(p) for p in found]}
    body |= {"trials": trials.kept, "dropped": trials.pruned, "asked": asdict(wanted), "prompts": len(items)}
    return {**body, **origin("offramp tune")}


@dataclass
class Trials:
    """What has been measured. points: whole trials, and plain generation as `never`; kept: a record of every trial."""

    space: Space
    prompts: Sequence[Tensor]
    new_tokens: int
    points: list[Point] = field(default_factory=lambda: [Point(1.0, 1.0, {"policy": "never"})])
    kept: list[dict[str, Any]] = field(default_factory=list)
    pruned: int = 0

    def objective(self, trial: Any) -> tuple[float, float]:
        """Return (median ratio to plain generation, agreement) of the setting that a trial suggests.

        Prompt by prompt, plain generation and the setting take turns in being first; the trial is dropped as soon as it
        is hopeless, or when the exits do not fit the setting.
        """
        pruned = optuna().TrialPruned
        record: dict[str, Any] = {"number": trial.number}
        self.kept.append(record)
        try:
            record["setting"] = flag = self.space.suggest(trial)
            setting = Setting.of({k: v for k, v in flag.items() if k != "at"})
            with self.space.only(flag["at"]) as exits:
                ratios, agreements = self.measure(setting, exits)
        except OfframpError as error:
            record["unfit"] = str(error)
            self.pruned += 1
            raise pruned(str(error)) from error
        record |= {"ratios": ratios, "agreements": agreements, "dropped": len(ratios) < len(self.prompts)}
        if record["dropped"]:
            self.pruned += 1
            raise pruned(f"dominated after {len(ratios)} prompts")
        speed, agreement = statistics.median(ratios), statistics.fmean(agreements)
        self.points.append(Point(speed, agreement, flag, trial.number))
        return speed, agreement

    def measure(self, setting: Setting, exits: Any) -> tuple[list[float], list[float]]:
        """Return the ratio and the agreement of each prompt, of fewer prompts when the trial is hopeless."""
        model, ratios, agreements = exits.model, [], []
        plain = Generate("generate", model, self.new_tokens)
        early = Generate("early", model, self.new_tokens, setting.policy(exits), setting.enabled())
        for n, ids in enumerate(self.prompts):
            order = {w.name: w for w in ((plain, early) if n % 2 else (early, plain))}
            timed = measure.interleaved(order, [ids], warm=1 if n == 0 else 0)
            mine, full = timed["early"][0], timed["generate"][0]
            made = [t.result.numel() - ids.numel() for t in (mine, full)]
            ratios.append(made[0] / mine.seconds / (made[1] / full.seconds))
            same = torch.equal(mine.result, full.result)
            agreements.append(1.0 if same else measure.agreement(model, [mine.result], [ids]))
            if n + 1 < len(self.prompts) and hopeless(ratios, agreements, self.points):
                break
        return ratios, agreements


def front_table(points: Sequence[Point], best: Point) -> Table:
    """Return the Pareto front for the terminal; the setting that is written has a star."""
    out = Table(title="Nothing tried beats these on both counts", title_justify="left", box=SIMPLE)
    for name in ("", "trial", "speed", "agreement", "exits", "setting"):
        out.add_column(name, justify="left" if name == "setting" else "right")
    for point in points:
        flag = {k: v for k, v in point.flag.items() if k != "at"}
        star, at = "*" if point is best else "", ",".join(map(str, point.flag.get("at", ()))) or "-"
        number = str(point.number) if point.number >= 0 else "-"
        out.add_row(star, number, f"{point.speed:.2f}x", f"{point.agreement:.1%}", at, Setting.of(flag).name)
    return out
