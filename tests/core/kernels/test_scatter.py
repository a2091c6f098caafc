"""Rows put back where they came from."""

import pytest
import torch

from offramp.errors import BadArgument
from offramp.kernels.compact import compact
from offramp.kernels.scatter import scatter

SHAPES = [
    (0, 0, (3,)), (1, 1, ()), (1, 0, (4,)), (2, 1, (0,)), (3, 3, (5, 7)), (7, 2, (16,)), (8, 8, (1024,)),
    (9, 4, (1025,)), (17, 9, (3, 2, 2)), (31, 1, (2,)), (32, 31, (1,)), (33, 16, (129,)), (64, 63, (10,)),
    (65, 64, (4, 4)), (127, 5, (3,)), (1024, 1000, (2,)), (1025, 1025, (1,)), (2049, 7, ()), (5, 3, (2047,)),
    (100, 50, (33,)),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_indexing(implementation, device, dtype, shape):
    rows, count, rest = shape
    index = torch.randperm(rows)[:count].to(device)
    values, out = torch.randn(count, *rest).to(dtype).to(device), torch.randn(rows, *rest).to(dtype).to(device)
    wanted = out.clone()
    wanted[index] = values
    assert scatter(index, values, out) is out and torch.equal(out, wanted)


def test_undoes_compact(implementation, device):
    given, mask = torch.randn(9, 4, device=device), torch.rand(9, device=device) < 0.5
    out = torch.zeros_like(given)
    for side in (mask, ~mask):
        index, kept = compact(side, given)
        scatter(index, kept, out)
    assert torch.equal(out, given)


def test_casts_to_the_type_of_out(implementation, device):
    out = torch.zeros(3, 2, dtype=torch.bfloat16, device=device)
    scatter(torch.tensor([1], device=device), torch.tensor([[1.5, 2.5]], device=device), out)
    assert out.tolist() == [[0, 0], [1.5, 2.5], [0, 0]]


def test_not_contiguous(implementation, device):
    out, values = torch.zeros(4, 3, 2, device=device).permute(1, 0, 2), torch.randn(2, 4, 4, device=device)[:, :, ::2]
    index = torch.tensor([2, 0], device=device)
    scatter(index, values, out)
    assert torch.equal(out[index], values) and not out[1].any()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_rows_that_do_not_exist(implementation, device, wrong):
    index, values = torch.tensor([0, wrong], device=device), torch.ones(2, 2, device=device)
    out = torch.zeros(3, 2, device=device)
    if implementation == "torch":
        with pytest.raises(BadArgument, match="index must name rows of out, 0 to 2"):
            scatter(index, values, out)
    else:
        assert scatter(index, values, out).tolist() == [[1, 1], [0, 0], [0, 0]]


def test_shapes_that_do_not_fit():
    with pytest.raises(BadArgument, match=r"not \[2\], \[2, 3\] and \[4, 2\]"):
        scatter(torch.tensor([0, 1]), torch.zeros(2, 3), torch.zeros(4, 2))
