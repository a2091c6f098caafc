"""What `offramp tune` may choose: which exits, which policy with which thresholds, and how drafts are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import offramp
from offramp._registry import create, lookup
from offramp.draft import DraftRule
from offramp.errors import BadArgument
from offramp.gating import gate_of
from offramp.policy import ExitPolicy, ThresholdPolicy

#: policies that are tried when none are named: their scores cost least
POLICIES = ("confidence", "margin", "entropy", "fixed")
#: longest draft that is tried
LONGEST = 12


class Space:
    """The choices for one model and its fitted exits. policies: names with a ladder; lossless: verified only."""

    def __init__(self, exits: Any, policies: Sequence[str], lossless: bool) -> None:
        self.model, self.at, self.head, self.config = exits.model, exits.at, exits.head, exits.config
        self.lossless = lossless
        self.classes: int = exits.backbone.context().classes
        self.policies = list(policies)
        for name in self.policies:
            self.ladder(name, self.at)
        self.states = {d: {k: v.detach().clone() for k, v in exits[d].state_dict().items()} for d in self.at}
        #: draft rules that fit these heads, and those of them that do with a single exit
        self.rules = [n for n in offramp.names(offramp.DraftRule) if self.fits(n, self.at, exits)]
        self.rules_of_one = [n for n in self.rules if self.fits(n, self.at[:1], exits)]
        exits.detach()

    @staticmethod
    def fits(name: str, at: Sequence[int], exits: Any) -> bool:
        """Whether a draft rule can work with exits `at` of this model."""
        rule: DraftRule = create(DraftRule, name)
        try:
            rule.check(at, exits.head, exits.mixes)
        except BadArgument:
            return False
        return not rule.branches or exits.backbone.trees

    def ladder(self, name: str, at: Sequence[int]) -> list[ExitPolicy]:
        """Return a policy's settings for exits `at` from safest to boldest; raises `BadArgument`, `UnknownName`."""
        example: ExitPolicy = lookup(ExitPolicy, name).example(at, self.classes)
        if "gate" in example.statistics() or any(map(gate_of, example.statistics())):
            raise BadArgument(f"policy {name!r} reads a gate, which parts of the exits lack; leave it out")
        return example.ladder(at, self.classes)

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Return an `early_exit` dict, with the depths of its exits under "at".

        Thresholds are places on the policy's own ladder, one per exit where it takes one per exit.
        """
        shallow = trial.suggest_categorical("shallow", list(self.at))
        more = [d for d in self.at if d > shallow and trial.suggest_categorical(f"exit_{d}", [True, False])]
        at = [shallow, *more]
        name = trial.suggest_categorical("policy", self.policies)
        ladder = self.ladder(name, at)
        steps = (
            {d: self.place(trial, f"{name}_{d}", ladder) for d in at} if isinstance(ladder[0], ThresholdPolicy) else {}
        )
        if steps:
            policy = dataclasses.replace(steps[shallow], threshold=tuple(p.threshold for p in steps.values()))
        else:
            policy = self.place(trial, name, ladder)
        verify = self.lossless or trial.suggest_categorical("verify", [True, False])
        how = (
            {"draft": self.draft(trial, len(at))}
            if verify
            else {"kv": trial.suggest_categorical("kv", ["catch_up", "propagate"])}
        )
        return {**policy.config(), "verify": verify, **how, "at": at}

    def place(self, trial: Any, name: str, ladder: Sequence[Any]) -> Any:
        """Return a rung of a ladder; the parameter is a share, so that it means the same on ladders of any length."""
        return ladder[round(trial.suggest_float(f"bold_{name}", 0.0, 1.0) * (len(ladder) - 1))]

    def draft(self, trial: Any, exits: int) -> Any:
        """Return how drafts are made: None (adapting), or a rule with its options."""
        if exits > 1:
            rule = trial.suggest_categorical("draft", self.rules)
        else:
            rule = trial.suggest_categorical("draft_of_one", self.rules_of_one)
        if rule == "adaptive":
            return None
        found: dict[str, Any] = {"rule": rule}
        for option in dataclasses.fields(lookup(DraftRule, rule)):
            value, name = option.default, f"{rule}_{option.name}"
            if option.name == "length":
                found["length"] = trial.suggest_int(name, 1, LONGEST)
            elif isinstance(value, float) and 0 < value < 1:
                found[option.name] = trial.suggest_float(name, 0.05, 0.95)
        return found

    @contextmanager
    def only(self, at: Sequence[int]) -> Iterator[Any]:
        """Attach the fitted exits at these depths while the context lasts."""
        with offramp.attach(self.model, list(at), self.head, **self.config) as exits:
            for depth in exits.at:
                exits[depth].load_state_dict(self.states[depth])
            yield exits

    def written(self, flag: dict[str, Any], where: str, out: Path) -> dict[str, Any]:
        """Return the dict that `offramp.enable(model)` takes; a part of the exits of `where` is saved beside `out`."""
        at = tuple(flag.get("at", self.at))
        source = str(Path(where).resolve()) if Path(where).exists() else where
        if at != self.at:
            folder = out.resolve().with_name(f"{out.stem}-exits")
            if folder == Path(source):
                raise BadArgument(f"--out {out} would write exits over {where}; choose another name")
            with self.only(at) as exits:
                exits.save(folder)
            source = str(folder)
        return {**{k: v for k, v in flag.items() if k != "at" and v is not None}, "exits": source}
