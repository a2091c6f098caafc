"""The contract of an exit policy: evidence and state in, the rows that stop here and new state out."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp.errors import BadArgument

#: policy state: the batch is dimension 0 of every tensor, so rows can leave with one index
State = dict[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """What a policy sees at one exit.

    index: which exit (0 = shallowest); depth: blocks run so far; first, last: is it the shallowest / deepest exit that
    can stop; hidden: [rows, width] or None; prediction: the head's logits [rows, classes] or None; classes: how many;
    position: [rows] tokens already generated (or the time step), or None; stats: [rows] tensors by name; head: the
    exit's own, for a policy that asks its gate; recent: per row the exit depths of its tokens so far, oldest first, on
    the host, or None where rows are no texts; before: the prediction at the exit before, where it is known.
    """

    index: int
    depth: int
    first: bool
    last: bool
    hidden: Tensor | None = None
    prediction: Tensor | None = None
    classes: int = 0
    position: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    head: Any = None
    recent: Sequence[Sequence[int]] | None = None
    before: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Return the statistic `name` as a [rows] tensor; raises `BadArgument` when the policy did not ask for it."""
        try:
            return self.stats[name]
        except KeyError:
            have = ", ".join(sorted(self.stats)) or "none"
            raise BadArgument(
                f"statistic {name!r} was not computed (have: {have}); add it to the policy class: "
                f"needs = frozenset({{{name!r}}})"
            ) from None

    def every(self, stop: bool) -> Tensor:
        """Return a bool mask [rows] that is `stop` for every row, on the device of the evidence."""
        for found in (*self.stats.values(), self.hidden, self.prediction, self.position):
            if found is not None:
                return torch.full(found.shape[:1], stop, dtype=torch.bool, device=found.device)
        raise BadArgument("this evidence holds no tensor at all; an executor gives at least the hidden state")


@dataclass(frozen=True)
class Feedback:
    """What became known later: `accepted` and `drafted` [rows] after verification, or `correct` [rows].

    With `correct` come, in `stats`, the statistics [rows] that the policy saw when it stopped them at exit `index`.
    """

    index: int
    accepted: Tensor | None = None
    drafted: Tensor | None = None
    correct: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)


class ExitPolicy(ABC):
    """Decides which rows stop at an exit.

    Subclass as a frozen dataclass in a file of the policy's own name and decorate with `@register("name")`. A policy
    has no weights and never looks across rows.
    """

    #: statistics to compute for this policy: top1, margin, entropy, sharpened, energy, label, cosine; "prediction" asks
    #: for the logits, a gate's `statistic` ("agrees", "jei", "lambda", ...) for the gate beside the exits, "gate" for
    #: gates inside the heads, which a policy asks itself and a trace holds as probabilities
    needs: ClassVar[frozenset[str]] = frozenset()
    #: "up": raising the threshold is safer and slower; "down": lowering it is; "" for policies without a threshold
    safer: ClassVar[str] = ""

    def statistics(self) -> frozenset[str]:
        """Return the statistics this instance needs; wrappers add those of the policies they hold."""
        return type(self).needs

    def start(self, batch: int, device: torch.device | str) -> State:
        """Return the state before the first exit; every tensor has `batch` as dimension 0."""
        return {}

    @abstractmethod
    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Return a bool mask [rows] of the rows that stop here, and the new state."""

    def learns(self) -> bool:
        """Whether `learn` does anything; nobody gathers feedback otherwise."""
        return type(self).learn is not ExitPolicy.learn

    def confirm(self, state: State, prediction: Tensor) -> Tensor | None:
        """Return the rows [rows] that may stop with this prediction [rows, classes], or None for all of them.

        Asked after `step` stopped a row whose logits nobody had computed yet. A policy with an opinion here cannot be
        held by another one.
        """
        return None

    def learn(self, state: State, feedback: Feedback) -> State:
        """Take in verification results or late labels; the default ignores them."""
        return state

    def opens(self, depth: int) -> bool:
        """Whether an exit at `depth` could ever stop a row; where it could not, nobody needs to look."""
        return True

    def inside(self) -> ExitPolicy:
        """Return the policy that this one follows at every exit that it `opens`: itself, unless it only shuts exits."""
        return self

    def check(self, depths: Sequence[int]) -> None:
        """Raise `BadArgument` when the policy does not fit exits at these depths (one threshold per exit, ...)."""
        threshold = getattr(self, "threshold", None)
        if isinstance(threshold, tuple) and len(threshold) != len(depths):
            raise BadArgument(
                f"{type(self).__name__} was given {len(threshold)} thresholds for {len(depths)} exits "
                f"(at {list(depths)}); give one number, or one per exit"
            )

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return candidates from safest to boldest, fixed before any data is seen (Learn-then-Test needs that)."""
        raise BadArgument(f"{type(self).__name__} has no threshold to calibrate; use it as it is")

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return an instance that fits exits at these depths: what `calibrate` and the contract suite start from.

        A policy with required arguments overrides this; `options` are the constructor's arguments that are known.
        """
        return cls(**options)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON values, with the registered name under "policy"."""
        out: dict[str, Any] = {"policy": getattr(type(self), "name", type(self).__name__)}
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            out[f.name] = _plain(getattr(self, f.name))
        return out


#: noise levels are told on the scale of the DDPM paper, 0 (data) to this (noise), whatever a model counts in
FULL = 1000.0


class SchedulePolicy(ExitPolicy):
    """A policy that says from the position alone which blocks run; decoded with kv="schedule", where no head is asked.

    The blocks of a position must be among those of every earlier one: each block that runs then holds keys and values
    of all tokens before, and none is computed again or copied. A policy with `timed` goes by the noise level of a
    denoiser's call instead, 0 (data) to 1000 (noise); its one window starts at 0, and no state outlasts a call.
    """

    #: whether positions are noise levels of denoisers, not generated tokens
    timed: ClassVar[bool] = False

    @abstractmethod
    def windows(self, position: Any, depth: int) -> tuple[tuple[int, int], ...]:
        """Return the windows (start, stop) of blocks that run, shallow first, for generated token `position` (from 0)
        of a model of `depth` blocks; raises `BadArgument` when the model is too shallow."""


#: thresholds of scores up to 1, safest first: steps of 0.01, finer where trained heads and cosines crowd just below 1
UNIT_GRID = (1.0, 0.9999, 0.9998, 0.9995, 0.999, 0.998, 0.995, *(round(0.99 - 0.01 * j, 2) for j in range(100)))


class ThresholdPolicy(ExitPolicy):
    """A policy that compares one score of each row with a threshold; subclasses say the score and `safer`.

    With `safer` "up" a row stops when score >= threshold, with "down" when score < threshold. NaN never stops.
    """

    threshold: float | tuple[float, ...]

    @abstractmethod
    def score(self, seen: Evidence) -> Tensor:
        """Return the score [rows] that is compared with the threshold."""

    def grid(self, classes: int) -> Sequence[float]:
        """Return thresholds from safest to boldest, independent of any data."""
        return UNIT_GRID

    def stops(self, seen: Evidence, threshold: float | Tensor) -> Tensor:
        """Return the mask [rows] for a threshold that may differ by row (a scalar or [rows])."""
        score = self.score(seen)
        return score >= threshold if type(self).safer == "up" else score < threshold

    def step(self, state: State, seen: Evidence) -> tuple[Tensor, State]:
        """Stop the rows whose score is on the sure side of this exit's threshold."""
        return self.stops(seen, at_exit(self.threshold, seen.index)), state

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return this policy at every threshold of `grid`, the same for all exits."""
        out: list[Any] = [dataclasses.replace(self, threshold=t) for t in self.grid(classes)]  # type: ignore[type-var]
        return out

    @classmethod
    def example(cls, depths: Sequence[int], classes: int, **options: Any) -> ExitPolicy:
        """Return an instance at threshold 0.5 unless another is given."""
        return cls(**{"threshold": 0.5, **options})


def _plain(value: Any) -> Any:
    if isinstance(value, ExitPolicy):
        return value.config()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def thresholds(value: float | Sequence[float], low: float, high: float, owner: str, *, open_low: bool = False) -> Any:
    """Check a scalar threshold or one per exit; returns a float or a tuple of floats.

    Raises `BadArgument` outside [low, high] (or ]low, high] with `open_low`): such a threshold could never fire, or
    fires always by mistake; "never exit" is the policy `never`.
    """
    several = isinstance(value, (list, tuple))
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values:
        raise BadArgument(f"{owner}: threshold is an empty list; give one number, or one per exit")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise BadArgument(f"{owner}: threshold {v!r} is not a number")
        if not low <= v <= high or (open_low and v == low):
            left = "]" if open_low else "["
            raise BadArgument(
                f"{owner}: threshold {v} is outside {left}{low:g}, {high:g}]; it could never act as meant. "
                f'To never exit, write offramp.enable(model, "never")'
            )
    return tuple(float(v) for v in values) if several else float(values[0])


def at_exit(threshold: float | tuple[float, ...], index: int) -> float:
    """Return the threshold of exit `index`: the scalar itself, or the exit's own value."""
    return threshold[index] if isinstance(threshold, tuple) else threshold
