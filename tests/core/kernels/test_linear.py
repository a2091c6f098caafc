"""Linear layers for a few states, against float64 and torch's own."""

import warnings

import pytest
import torch

from offramp.errors import BadArgument
from offramp.kernels import _select
from offramp.kernels.cpp import _build
from offramp.kernels.linear import in_cpp, linear

#: leading shape, classes, width: up to eight states are taken at once, in float32 16; 16 or 32 numbers are a step,
#: 480 classes a stretch, and four states of 1,300 numbers no longer stay near
SHAPES = [
    ((1,), 1, 1), ((1, 1), 7, 3), ((2,), 480, 16), ((1, 3), 481, 17), ((4,), 479, 31), ((5,), 33, 64), ((1, 6), 5, 65),
    ((7,), 961, 33), ((8,), 12, 48), ((2, 4), 100, 127), ((9,), 10, 40), ((16,), 9, 40), ((17,), 3, 9), ((), 6, 10),
    ((2, 3, 2), 4, 8), ((0,), 3, 4), ((1,), 40, 1300), ((3,), 7, 2100), ((4,), 100, 1300), ((6,), 20, 1301),
    ((8,), 31, 1030), ((1,), 1200, 300),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(implementation, device, dtype, unit, shape, with_bias):
    lead, classes, width = shape
    hidden, weight = torch.randn(*lead, width).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)
    bias = torch.randn(classes).to(dtype) if with_bias else None
    wanted = hidden.double() @ weight.double().T + (bias.double() if with_bias else 0)
    found = linear(*[t if t is None else t.to(device) for t in (hidden, weight, bias)])
    assert found.dtype == dtype and found.shape == wanted.shape
    sums = width * 2.0**-24 * hidden.abs().double().sum(-1, keepdim=True)
    assert ((found.cpu().double() - wanted).abs() <= 2 * unit * (wanted.abs() + 4) + sums).all()


def test_rows_do_not_see_one_another(implementation, device, dtype):
    hidden, weight = torch.randn(8, 70).to(dtype), torch.randn(50, 70).to(dtype)
    other = hidden.clone()
    other[1:] = torch.nan
    found = linear(other.to(device), weight.to(device))
    torch.testing.assert_close(found[0], linear(hidden.to(device), weight.to(device))[0])
    assert found[1:].isnan().all()


@pytest.mark.parametrize("odd", ["hidden", "weight", "rows of weight", "turned weight", "bias"])
def test_not_contiguous(implementation, device, dtype, odd):
    given = {"hidden": torch.randn(3, 16).to(dtype), "weight": torch.randn(22, 16).to(dtype), "bias": torch.ones(22)}
    given["bias"] = given["bias"].to(dtype)
    wanted = torch.nn.functional.linear(*given.values())
    name = odd.rpartition(" ")[2]
    dense = given[name]
    if odd == "rows of weight":
        given[name] = torch.cat([dense, dense], 1)[:, :16]
    elif odd == "turned weight":
        given[name] = dense.t().contiguous().t()
    else:
        given[name] = torch.stack([dense, dense], -1)[..., 0]
    assert torch.equal(given[name], dense) and not given[name].is_contiguous()
    torch.testing.assert_close(linear(*(t.to(device) for t in given.values())), wanted.to(device))


@pytest.mark.parametrize(
    ("hidden", "weight", "bias", "shapes"),
    [
        ((2, 8), (11, 7), None, r"not \[2, 8\], \[11, 7\]"),
        ((2, 8), (11, 8), (10,), r"not \[2, 8\], \[11, 8\] and \[10\]"),
        ((2, 8), (8,), None, r"not \[2, 8\], \[8\]"),
    ],
)
def test_shapes_that_do_not_fit(hidden, weight, bias, shapes):
    with pytest.raises(BadArgument, match=shapes):
        linear(torch.zeros(hidden), torch.zeros(weight), None if bias is None else torch.zeros(bias))


def test_gradients_come_from_the_reference(implementation):
    weight = torch.randn(5, 4, requires_grad=True)
    linear(torch.ones(1, 4), weight).sum().backward()
    assert weight.grad.tolist() == [[1] * 4] * 5


def recording(weight, bias):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that shapes become constants
        return torch.jit.trace(
            lambda x: torch.nn.functional.linear(x, weight, bias).relu(), torch.ones(2, 3), check_trace=False
        )


def test_a_recording_that_multiplies_in_cpp():
    weight, bias = torch.randn(7, 3), torch.randn(7)
    made = recording(weight, bias)
    found = in_cpp(made)
    kinds = [{node.kind() for node in graph.graph.nodes()} for graph in (made, found)]
    assert ["offramp::linear" in kind for kind in kinds] == [False, True]
    assert ["aten::linear" in kind for kind in kinds] == [True, False]
    for _ in range(3):  # torch compiles a recording in its second call
        other = torch.randn(2, 3)
        torch.testing.assert_close(found(other), torch.nn.functional.linear(other, weight, bias).relu())


def test_without_a_compiler_a_recording_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(_select, "_said", set())
    _build.load.cache_clear()
    made = recording(torch.randn(7, 3), None)
    with pytest.warns(UserWarning, match="linear: cpp is not used: there is no C[+][+] compiler .*; torch runs"):
        assert in_cpp(made) is made
    _build.load.cache_clear()
