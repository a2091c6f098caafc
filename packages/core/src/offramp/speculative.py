"""Around `speculative_gate`: the offline schedule of exits, and draft trees whose paths leave as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offramp.errors import BadArgument

if TYPE_CHECKING:
    from offramp.policy import ExitPolicy
    from offramp.trace import Trace


def busiest(trace: Trace, policy: ExitPolicy, count: int) -> list[int]:
    """Return the `count` depths at which `policy` stops most rows of `trace`, shallow first: the offline schedule.

    For `offramp.enable(model, "speculative_gate", layers=...)`. The first of equals is the shallower. Raises
    `BadArgument` when there are not as many exits.
    """
    from offramp.simulate import exit_columns

    exits = len(trace.depths) - 1
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= exits:
        raise BadArgument(f"count={count!r} must be a whole number of exits from 1 to {exits} (at {trace.depths[:-1]})")
    stops = torch.bincount(exit_columns(trace, policy), minlength=exits)[:exits]
    order = stops.argsort(descending=True, stable=True)[:count]
    return [trace.depths[column] for column in sorted(order.tolist())]


def path_depths(paths: Sequence[Sequence[int]], depths: Tensor) -> Tensor:
    """Return the depth [paths] at which each path of a draft tree is settled: the largest of its nodes' depths.

    A path is one hyper-token and cannot leave before its slowest token (SpecEE's Cannikin law). paths: root-to-leaf
    node indices; depths: int64 [nodes], the full depth for nodes that never exit. Raises `BadArgument` for a node that
    is not there, or a path without nodes.
    """
    odd = [node for path in paths for node in path if not 0 <= node < len(depths)]
    if odd or not all(len(path) for path in paths):
        raise BadArgument(f"every path needs nodes from 0 to {len(depths) - 1}; got {odd or 'an empty path'}")
    longest = max((len(path) for path in paths), default=0)
    # a path is filled up with its own first node, which changes no maximum
    index = [[*path, *[path[0]] * (longest - len(path))] for path in paths]
    if not index:
        return depths[:0]
    return depths[torch.tensor(index, device=depths.device)].amax(-1)
