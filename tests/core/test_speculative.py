"""The offline schedule, and paths of draft trees against brute force."""

import random

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.speculative import busiest, path_depths
from offramp.trace import Trace


def tree(nodes, make):
    """Parents of a random tree, and its root-to-leaf paths."""
    parents = [None] + [make.randrange(n) for n in range(1, nodes)]
    leaves = [n for n in range(nodes) if n not in parents]
    paths = []
    for leaf in leaves:
        path = [leaf]
        while parents[path[0]] is not None:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths


@pytest.mark.parametrize("seed", range(20))
def test_a_path_is_as_slow_as_its_slowest_node(seed):
    """Layer by layer: a path leaves at the first depth by which all its nodes have stopped."""
    make = random.Random(seed)
    nodes = make.randint(1, 20)
    paths, depths = tree(nodes, make), [make.choice([2, 4, 6, 8]) for _ in range(nodes)]
    wanted = []
    for path in paths:
        wanted.append(next(layer for layer in range(1, 9) if all(depths[n] <= layer for n in path)))
    assert path_depths(paths, torch.tensor(depths)).tolist() == wanted


def test_paths_that_are_none():
    assert path_depths([], torch.tensor([3])).tolist() == []
    for paths in ([[0, 2]], [[-1]], [[0], []]):
        with pytest.raises(BadArgument, match="every path needs nodes from 0 to 1"):
            path_depths(paths, torch.tensor([3, 4]))


def trace(columns):
    gate = torch.zeros(len(columns), 5)
    for row, column in enumerate(columns):
        gate[row, column] = 0.9
    return Trace((2, 4, 6, 8, 12), {"gate": gate}, torch.zeros(len(columns), 5, dtype=torch.long), 7)


def test_busiest_exits_by_how_many_rows_leave():
    policy = offramp.policy("speculative_gate")
    seen = trace([0, 2, 2, 2, 3, 3, 4, 4, 4, 4])  # the full model is no exit, however many get there
    assert [busiest(seen, policy, n) for n in (1, 2, 3, 4)] == [[6], [6, 8], [2, 6, 8], [2, 4, 6, 8]]
    assert busiest(trace([1, 3]), policy, 1) == [4]
    for count in (0, 5, True, 1.5):
        with pytest.raises(BadArgument, match="whole number of exits from 1 to 4"):
            busiest(seen, policy, count)
