"""Logits of given classes, against float64 and against the whole projection."""

import pytest
import torch

from offramp.errors import BadArgument
from offramp.kernels.subset_logits import among, subset_logits

#: leading shape, classes, width, ids per row
SHAPES = [
    ((1,), 1, 1, 1), ((3,), 11, 8, 4), ((0,), 5, 8, 4), ((2, 3), 11, 8, 4), ((), 9, 8, 3), ((4,), 2, 3, 7),
    ((1,), 7, 129, 2), ((5,), 100, 127, 17), ((2,), 33, 128, 16), ((3, 1, 2), 10, 5, 3), ((7,), 1000, 31, 1),
    ((1,), 50, 300, 33), ((2, 0), 4, 4, 4), ((3,), 6, 64, 0), ((16,), 17, 17, 5), ((1, 1), 3, 2, 9),
    ((6,), 257, 65, 15), ((2, 2), 8, 256, 31), ((9,), 12, 13, 11), ((1,), 4099, 3, 40),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(implementation, device, dtype, unit, shape, with_bias):
    lead, classes, width, count = shape
    hidden, weight = torch.randn(*lead, width).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)
    ids, bias = torch.randint(classes, (*lead, count)), torch.randn(classes).to(dtype) if with_bias else None
    wanted = (hidden.double() @ weight.double().T + (bias.double() if with_bias else 0)).gather(-1, ids)
    given = [t if t is None else t.to(device) for t in (hidden, weight, ids, bias)]
    found = subset_logits(*given)
    assert found.dtype == dtype and found.shape == ids.shape
    # rounded after the sum, and after the bias where it is added to a rounded number
    sums = width * 2.0**-24 * hidden.abs().double().sum(-1, keepdim=True)
    assert ((found.cpu().double() - wanted).abs() <= 2 * unit * (wanted.abs() + 4) + sums).all()


def test_the_nodes_of_a_tree_take_one_call(implementation, device):
    """Every node has candidates of its own; one call gives what a call per node gives."""
    hidden, weight = torch.randn(7, 8, device=device), torch.randn(11, 8, device=device)
    ids = torch.randint(11, (7, 4), device=device)
    one_by_one = [subset_logits(hidden[n : n + 1], weight, ids[n : n + 1]) for n in range(7)]
    torch.testing.assert_close(subset_logits(hidden, weight, ids), torch.cat(one_by_one))


def test_not_contiguous(implementation, device):
    hidden, weight = torch.randn(6, 16, device=device), torch.randn(22, 16, device=device)
    ids = torch.randint(11, (4, 3), device=device).t()
    found = subset_logits(hidden[::2, ::2], weight[::2, ::2], ids)
    wanted = (hidden[::2, ::2] @ weight[::2, ::2].T).gather(-1, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 11])
def test_ids_that_are_no_classes(implementation, device, wrong):
    hidden, weight = torch.randn(2, 8, device=device), torch.randn(11, 8, device=device)
    ids = torch.tensor([[0, 1], [wrong, 2]], device=device)
    if implementation == "torch":
        with pytest.raises(BadArgument, match="ids must be classes, 0 to 10"):
            subset_logits(hidden, weight, ids)
    else:
        assert subset_logits(hidden, weight, ids).isnan().tolist() == [[False, False], [True, False]]


def test_shapes_that_do_not_fit():
    with pytest.raises(BadArgument, match=r"not \[2, 8\], \[11, 7\] and \[2, 1\]"):
        subset_logits(torch.zeros(2, 8), torch.zeros(11, 7), torch.zeros(2, 1, dtype=torch.long))


def test_gradients_come_from_the_reference(implementation):
    weight = torch.randn(5, 4, requires_grad=True)
    subset_logits(torch.ones(1, 4), weight, torch.tensor([[3]])).sum().backward()
    assert weight.grad.sum(-1).tolist() == [0, 0, 0, 4, 0]


def test_among():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 9.0]])
    assert among(logits, torch.tensor([[0, 1], [1, 2], [2, 2]])).tolist() == [True, False, True]
