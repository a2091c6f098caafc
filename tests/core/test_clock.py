"""Clocks: ways take turns, blocks are timed, and a result names where it comes from."""

import time

import pytest
import torch
from torch import nn

from offramp import memory
from offramp.clock import Clocked, interleaved, machine, origin, quartiles


def test_ways_take_turns_and_warm_up_is_not_measured():
    order = []
    ways = {n: lambda item, n=n: order.append((n, item)) or n for n in "ab"}
    found = interleaved(ways, [1, 2], warm=1)
    assert order == [("a", 1), ("b", 1), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert [t.result for t in found["a"]] == ["a", "a"] and len(found["b"]) == 2


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


def test_time_is_told_block_by_block():
    model = nn.Sequential(nn.Identity(), Slow())
    clock = Clocked(list(model), model)
    with clock.ready():
        clock(torch.zeros(1))
    quick, slow = clock.kept[0]
    assert slow >= 0.02 > quick and clock.after(1, 1) == [slow]
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_results_name_their_machine():
    assert "CPU cores" in machine() and "numpy" in machine("numpy")
    assert set(origin("offramp bench x")) == {"command", "machine", "date", "version"}
    assert quartiles([2.0]) == [2.0] * 3 and quartiles([1.0, 2.0, 3.0])[1] == 2.0


@pytest.mark.parametrize(("asked", "said"), [("auto", ""), ("cpp", "OFFRAMP_KERNELS=cpp ")])
def test_a_command_names_the_kernels_that_were_asked_for(monkeypatch, asked, said):
    monkeypatch.setenv("OFFRAMP_KERNELS", asked)
    assert origin("offramp bench x")["command"] == f"{said}offramp bench x"


def test_freed_memory_is_kept_while_the_clock_runs(monkeypatch):
    order = []
    monkeypatch.setattr(memory, "_glibc", lambda name, *values: order.append((name, *values)))
    interleaved({"way": order.append}, [1, 2], warm=1)
    assert order[:2] == [("mallopt", memory.MAPS, 0), ("mallopt", memory.TRIM, -1)]
    assert order[2:5] == [1, 1, 2] and ("mallopt", memory.MAPS, memory.MAPS_AT_FIRST) in order[5:]
