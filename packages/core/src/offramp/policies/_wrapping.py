"""What policies that hold other policies share: building them, and keeping their states apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offramp._registry import policy_from
from offramp.errors import BadArgument
from offramp.policy import ExitPolicy, Feedback, State, ThresholdPolicy


def wrapped(value: Any, owner: str) -> ExitPolicy:
    """Return `value` as a policy: a policy object, or its config `{"policy": name, ...}`; else raises `BadArgument`."""
    if isinstance(value, dict) and "policy" in value:
        value = policy_from(value)
    if isinstance(value, ExitPolicy):
        if type(value).confirm is not ExitPolicy.confirm:
            raise BadArgument(
                f"{owner}: {type(value).__name__} has the full head confirm every exit and cannot be held by another "
                f"policy; enable it alone"
            )
        return value
    raise BadArgument(
        f'{owner}: {value!r} is not a policy; give offramp.policy("confidence", threshold=0.9) '
        f'or {{"policy": "confidence", "threshold": 0.9}}'
    )


@dataclass(frozen=True)
class Wrapping(ExitPolicy):
    """A policy around another one, `inner` (a policy or its config), which it asks for all that it does not change."""

    inner: ExitPolicy

    def statistics(self) -> frozenset[str]:
        """Return what the wrapped policy needs."""
        return self.inner.statistics()

    def start(self, batch: int, device: torch.device | str) -> State:
        """Return the wrapped policy's state."""
        return self.inner.start(batch, device)

    def learns(self) -> bool:
        """Whether the wrapped policy does."""
        return self.inner.learns()

    def learn(self, state: State, feedback: Feedback) -> State:
        """Let the wrapped policy learn."""
        return self.inner.learn(state, feedback)

    def check(self, depths: Sequence[int]) -> None:
        """Check the wrapped policy."""
        self.inner.check(depths)

    def ladder(self, depths: Sequence[int], classes: int) -> list[ExitPolicy]:
        """Return the wrapped policy's ladder, each rung wrapped alike."""
        return [dataclasses.replace(self, inner=rung) for rung in self.inner.ladder(depths, classes)]


def forgetful(policy: ExitPolicy) -> bool:
    """Whether the policy decides at each exit from what is seen there alone, so that it need not look where it could
    not stop.
    """
    return type(policy).step is ThresholdPolicy.step


def wrapped_list(values: Any, owner: str) -> tuple[ExitPolicy, ...]:
    """Return a non-empty list of policies or configs as a tuple of policies; raises `BadArgument`."""
    if not isinstance(values, (list, tuple)) or not values:
        raise BadArgument(f"{owner}: policies must be a non-empty list of policies, not {values!r}")
    return tuple(wrapped(v, owner) for v in values)


def join(states: Sequence[State]) -> State:
    """Return one flat state: tensor `name` of policy `i` is kept as `"i.name"`."""
    return {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}


def part(state: State, i: int) -> State:
    """Return the state of policy `i` out of a joined one."""
    head = f"{i}."
    return {name[len(head) :]: tensor for name, tensor in state.items() if name.startswith(head)}
