"""`verify` in Triton: one program per row walks down its drafts; draws and rejection are torch operations before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp.kernels.verify import Verified


@triton.jit
def _kernel(drafts, target, lengths, parents, accepted, token, keep, count):
    row = tl.program_id(0).to(tl.int64)
    slot = row * 0
    found = row * 0
    last = tl.minimum(tl.load(lengths + row), count)
    said = tl.load(target + row * (count + 1))
    tl.store(keep + row * (count + 1), slot)
    for draft in range(0, count):
        stands = (tl.load(parents + row * count + draft) + 1 == slot) & (draft < last)
        stands = stands & (tl.load(drafts + row * count + draft) == said)
        found = tl.where(stands, found + 1, found)
        slot = tl.where(stands, draft + 1, slot)
        said = tl.load(target + row * (count + 1) + slot)
        tl.store(keep + row * (count + 1) + found, slot)
    tl.store(accepted + row, found)
    tl.store(token + row, said)


def verify(drafts: Tensor, target: Tensor, lengths: Tensor, parents: Tensor | None) -> Verified:
    """Launch one program per row."""
    rows, count = drafts.shape
    if parents is None:
        parents = torch.arange(-1, count - 1, device=drafts.device).expand(rows, -1)
    accepted, token = torch.empty((2, rows), dtype=torch.long, device=drafts.device).unbind()
    keep = torch.full((rows, count + 1), -1, dtype=torch.long, device=drafts.device)
    if rows:
        given = [t.long().contiguous() for t in (drafts, target, lengths, parents)]
        _kernel[(rows,)](*given, accepted, token, keep, count)
    return Verified(accepted, token, keep)
