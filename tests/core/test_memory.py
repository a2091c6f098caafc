"""The most memory that a stretch of work takes: what it frees again counts, what was there before does not."""

import sys

import torch

from offramp.memory import Peak

MB = 1 << 20


def test_what_is_freed_again_counts_and_what_was_there_does_not():
    kept = torch.ones(64 * MB // 4)
    with Peak() as small:
        torch.ones(32 * MB // 4)
    with Peak() as large:
        torch.ones(96 * MB // 4)
        torch.ones(48 * MB // 4)
    with Peak() as nothing:
        pass
    if sys.platform != "linux":  # only Linux tells the highest resident memory
        assert small.taken is large.taken is nothing.taken is None
        return
    assert len(kept) and 31 * MB <= small.taken < 48 * MB and 95 * MB <= large.taken < 112 * MB
    assert nothing.taken < 8 * MB


def test_a_system_that_does_not_say_gives_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    with Peak() as peak:
        torch.ones(MB)
    assert peak.taken is None
