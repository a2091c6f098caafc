"""What a schedule needs around it: the options it goes with, and which blocks each place of a whole text runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offramp.errors import BadArgument, NotAttached
from offramp.policy import ExitPolicy, SchedulePolicy

if TYPE_CHECKING:
    from offramp.attach import Exits
    from offramp.options import Options


def check_schedule(exits: Exits, policy: ExitPolicy, options: Options) -> None:
    """Raise unless a schedule is decoded as one and fits the model, and every other policy has exits to decide at."""
    name = getattr(type(policy), "name", type(policy).__name__)
    timed = isinstance(policy, SchedulePolicy) and policy.timed
    if timed and not exits.backbone.timed:
        raise BadArgument(
            f"{name} goes by the noise level, and calls of {type(exits.model).__name__} carry none; use a policy that "
            f'needs none, e.g. offramp.enable(model, "fixed", depth=...)'
        )
    if isinstance(policy, SchedulePolicy) and not timed:
        if options.kv != "schedule" or options.verify:
            raise BadArgument(
                f'{name} says which blocks run and asks no exit, so it needs kv="schedule" and no verify: '
                f'offramp.enable(model, "{name}", ..., kv="schedule")'
            )
        policy.windows(0, exits.backbone.depth)  # raises where the model is too shallow
    elif isinstance(policy, SchedulePolicy) and timed:
        policy.windows(0.0, exits.backbone.depth)
    elif options.kv == "schedule":
        raise BadArgument(
            f'kv="schedule" is for a policy that fixes the blocks of every position (position_schedule); {name} '
            f'decides from what it sees: leave kv out, or choose kv="catch_up" or kv="propagate"'
        )
    elif not exits.at:
        raise NotAttached(f"{name} decides at exits, and none were attached; first: offramp.attach(model, at=[...])")


def check_training(policy: object, backbone: bool, depth: int) -> None:
    """Raise unless `fit` can train a model of `depth` blocks to be decoded with this schedule."""
    if not isinstance(policy, SchedulePolicy) or not backbone:
        raise BadArgument(
            f"schedule={policy!r} needs backbone=True and a policy that fixes the blocks of every position: "
            f'schedule=offramp.policy("position_schedule", max_depth=..., min_depth=..., length=...)'
        )
    policy.windows(0, depth)  # raises where the model is too shallow


def runs(policy: SchedulePolicy, positions: Tensor, depth: int) -> Tensor:
    """Return which of `depth` blocks run at each place, bool [*positions.shape, depth].

    positions: int64, which generated token a place predicts; up to 0 the place belongs to the prompt and runs them all.
    """
    table = torch.zeros(max(1, int(positions.max()) + 1), depth, dtype=torch.bool)
    table[0] = True
    for position in range(1, len(table)):
        for start, stop in policy.windows(position, depth):
            table[position, start:stop] = True
    return table.to(positions.device)[positions.clamp(min=0)]
