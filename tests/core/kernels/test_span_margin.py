"""The gap between the two best logits, averaged over marked positions."""

import pytest
import torch

from offramp.errors import BadArgument
from offramp.kernels.span_margin import span_margin

SHAPES = [
    (0, 3, 5), (1, 1, 1), (1, 1, 2), (2, 3, 4), (3, 1, 7), (1, 5, 127), (2, 2, 128), (3, 3, 129), (5, 4, 33),
    (7, 2, 65), (1, 9, 257), (4, 4, 16), (2, 7, 1000), (1, 2, 4096), (1, 2, 4097), (2, 1, 8193), (9, 3, 11),
    (6, 6, 6), (2, 0, 5), (8, 2, 50),
]  # fmt: skip


def wanted(logits, where):
    pair = logits.double().topk(2, -1).values if logits.shape[-1] > 1 else None
    gap = pair[..., 0] - pair[..., 1] if pair is not None else torch.full(where.shape, torch.inf).double()
    return torch.stack([g[w].mean() for g, w in zip(gap, where, strict=True)]) if len(gap) else gap.sum(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_equals_float64(implementation, device, dtype, shape, share):
    logits, where = torch.randn(*shape).to(dtype), torch.rand(*shape[:2]) < share
    found = span_margin(logits.to(device), where.to(device))
    # the logits are exact as they come; the difference and the mean are float32
    torch.testing.assert_close(found.double().cpu(), wanted(logits, where), rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("with_bias", [False, True])
def test_projected_as_it_goes(implementation, device, with_bias):
    hidden, weight = torch.randn(3, 5, 16, device=device), torch.randn(301, 16, device=device)
    bias = torch.randn(301, device=device) if with_bias else None
    where = torch.rand(3, 5, device=device) < 0.5
    logits = hidden.double() @ weight.double().T + (bias if with_bias else 0)
    found = span_margin(hidden, where, weight, bias)
    torch.testing.assert_close(found.double(), wanted(logits, where).to(device), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_not_contiguous(implementation, device):
    values, where = torch.randn(4, 5, 14, device=device), torch.rand(2, 10, device=device) > 0.3
    given = values[::2, :, ::2], where[:, ::2]
    torch.testing.assert_close(span_margin(*given), span_margin(*(t.contiguous() for t in given)), equal_nan=True)


def test_equal_classes_are_no_margin(implementation, device):
    logits = torch.tensor([[[1.0, 3.0, 3.0]]], device=device)
    assert span_margin(logits, torch.ones(1, 1, dtype=torch.bool, device=device)).tolist() == [0.0]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_position_breaks_its_row_where_it_is_marked(implementation, device, broken):
    logits, where = torch.randn(3, 2, 9, device=device), torch.ones(3, 2, dtype=torch.bool, device=device)
    logits[0, 1, 4] = logits[1, 1, 0] = broken
    where[1, 1] = False
    assert span_margin(logits, where).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("values", "where", "bias", "said"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3).bool(), None, "span_margin takes"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4).bool(), None, "span_margin takes"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), None, "span_margin takes"),
        (torch.zeros(2, 3, 0), torch.zeros(2, 3).bool(), None, "span_margin takes"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).bool(), torch.zeros(4), "bias= goes with weight="),
    ],
)
def test_what_does_not_fit_is_said(values, where, bias, said):
    with pytest.raises(BadArgument, match=said):
        span_margin(values, where, bias=bias)
