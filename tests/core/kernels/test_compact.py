"""Rows that go on, in order, for tensors of any type and shape."""

import pytest
import torch

from offramp.errors import BadArgument
from offramp.kernels.compact import compact

#: rows, and the shape of one row
SHAPES = [
    (0, (3,)), (1, ()), (1, (1,)), (2, (0,)), (3, (5, 7)), (7, (16,)), (8, (1024,)), (9, (1025,)), (17, (3, 2, 2)),
    (31, (2,)), (32, (1,)), (33, (129,)), (64, (10,)), (65, (4, 4)), (127, (3,)), (255, (2,)), (1025, (1,)),
    (400, ()), (5, (2047,)), (100, (33,)),
]  # fmt: skip
MASKS = {
    "some": lambda n: torch.rand(n) < 0.4,
    "none": lambda n: torch.zeros(n).bool(),
    "all": lambda n: torch.ones(n).bool(),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("known", [False, True])
def test_equals_indexing(implementation, device, dtype, shape, which, known):
    rows, rest = shape
    mask, hidden = MASKS[which](rows).to(device), torch.randn(rows, *rest).to(dtype).to(device)
    number = torch.arange(rows, device=device)
    count = int(mask.sum()) if known else None
    index, kept, numbers = compact(mask, hidden, number, count=count)
    assert torch.equal(index, mask.nonzero().squeeze(-1)) and torch.equal(numbers, index)
    assert torch.equal(kept, hidden[mask]) and kept.dtype == dtype


@pytest.mark.parametrize("other", [torch.bool, torch.int32, torch.float64])
def test_other_types(implementation, device, other):
    mask = torch.tensor([True, False, True], device=device)
    given = (torch.rand(3, 5, device=device) * 3).to(other)
    assert torch.equal(compact(mask, given)[1], given[mask])


def test_not_contiguous(implementation, device):
    mask = torch.tensor([False, True, True, False, True, False], device=device)[::2]
    given = torch.randn(4, 3, 2, device=device).permute(1, 0, 2)
    assert torch.equal(compact(mask, given)[1], given[mask])


def test_no_tensors(implementation, device):
    (index,) = compact(torch.tensor([False, True], device=device))
    assert index.tolist() == [1]


def test_a_known_count_waits_for_nothing(implementation, device):
    """Reading a number of a tensor back is `aten::_local_scalar_dense`; `nonzero` waits for the size of its result."""
    mask, hidden = torch.rand(20, device=device) < 0.5, torch.randn(20, 3, device=device)
    count = int(mask.sum())
    with torch.profiler.profile() as seen:
        compact(mask, hidden, count=count)
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}
    assert implementation == "triton" or not waits & {event.key for event in seen.key_averages()}


@pytest.mark.parametrize(
    ("mask", "tensors", "count", "said"),
    [
        (torch.zeros(3), [], None, "bool mask"),
        (torch.zeros(3, 1).bool(), [], None, "bool mask"),
        (torch.zeros(3).bool(), [torch.zeros(2)], None, "the mask's 3"),
        (torch.zeros(3).bool(), [], 4, "count=4 is no number of rows, 0 to 3"),
        (torch.zeros(3).bool(), [torch.zeros(3, device="meta")], None, "on cpu and on meta"),
    ],
)
def test_what_does_not_fit_is_said(mask, tensors, count, said):
    with pytest.raises(BadArgument, match=said):
        compact(mask, *tensors, count=count)
