"""Which implementation runs, and what is said when it cannot."""

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch

import offramp
from offramp import kernels
from offramp.errors import BadArgument, UnknownName
from offramp.kernels import _select
from offramp.kernels.cpp import _build
from offramp.kernels.fill_kv import Projection
from offramp.kernels.head_stats import Norm

HERE = Path(__file__).parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(_select, "_said", set())
    _build.load.cache_clear()
    yield
    _build.load.cache_clear()


def call():
    return offramp.kernels.head_stats(torch.ones(1, 2), torch.eye(2) * 3)


def test_names_are_the_files():
    assert offramp.names(offramp.kernels) == _select.ops()
    wanted = {"head_stats", "subset_logits", "compact", "scatter", "fill_kv", "verify", "span_margin", "row_attention"}
    assert wanted <= set(_select.ops())


@pytest.mark.parametrize("op", _select.ops())
def test_every_op_is_a_function_of_its_name_with_a_test(op):
    module = importlib.import_module(f"offramp.kernels.{op}")
    assert callable(getattr(module, op)) and getattr(module, op).__module__ == module.__name__
    assert (HERE / f"test_{op}.py").is_file()


@pytest.mark.parametrize("op", _select._stems("offramp.kernels.triton"))
@LINUX
def test_every_triton_file_is_an_op_with_that_function(op):
    assert op in _select.ops()
    assert callable(getattr(importlib.import_module(f"offramp.kernels.triton.{op}"), op))


@pytest.mark.parametrize("op", _select._stems("offramp.kernels.cpp"))
def test_every_cpp_file_is_an_op_with_that_function(op):
    assert op in _select.ops()
    assert callable(getattr(importlib.import_module(f"offramp.kernels.cpp.{op}"), op))


@pytest.mark.parametrize("mode", ["auto", "torch", None])
def test_the_cpu_takes_torch_and_says_nothing(monkeypatch, mode):
    monkeypatch.delenv("OFFRAMP_KERNELS", raising=False)
    if mode:
        monkeypatch.setenv("OFFRAMP_KERNELS", mode)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert call().first.item() == 3
    assert not said


@pytest.mark.parametrize(
    ("mode", "absent", "reason"),
    [
        ("cuda", False, "there are no CUDA C[+][+] kernels"),
        ("triton", True, "triton is not installed; write: pip install"),
        ("cpp", True, "there is no C[+][+] compiler 'no-such-compiler'; write e.g. apt-get install g[+][+]"),
    ],
)
def test_what_is_missing_is_said_once_and_torch_runs(monkeypatch, mode, absent, reason):
    monkeypatch.setenv("OFFRAMP_KERNELS", mode)
    if absent:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=f"head_stats: {mode} is not used: {reason}.*; torch runs instead"):
        assert call().first.item() == 3
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert call().first.item() == 3
    assert not said


@LINUX
def test_triton_without_its_interpreter(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setenv("OFFRAMP_KERNELS", "triton")
    with pytest.warns(UserWarning, match="Triton does not compile for 'cpu'; set TRITON_INTERPRET=1"):
        call()
    assert "TRITON_INTERPRET=1" in offramp.kernels.available("head_stats")["triton"]


def elsewhere(*size):
    return torch.zeros(*size, device="meta")


#: op -> a call with one tensor on another device
SPLIT = {
    "head_stats": lambda: kernels.head_stats(torch.zeros(2, 4), elsewhere(5, 4)),
    "subset_logits": lambda: kernels.subset_logits(torch.zeros(2, 4), elsewhere(5, 4), torch.zeros(2, 3).long()),
    "compact": lambda: kernels.compact(torch.ones(3).bool(), elsewhere(3, 4)),
    "scatter": lambda: kernels.scatter(torch.zeros(1).long(), elsewhere(1, 4), torch.zeros(3, 4)),
    "verify": lambda: kernels.verify(torch.zeros(2, 3).long(), elsewhere(2, 4).long()),
    "span_margin": lambda: kernels.span_margin(torch.zeros(1, 3, 5), elsewhere(1, 3).bool()),
    "fill_kv": lambda: kernels.fill_kv(
        torch.zeros(1, 4), [Projection(Norm(torch.ones(4)), torch.zeros(2, 4), torch.zeros(2, 4))],
        [torch.zeros(1, 1, 3, 2)], [elsewhere(1, 1, 3, 2)], torch.zeros(1).long(),
    ),
    "row_attention": lambda: kernels.row_attention(
        torch.zeros(1, 2, 4), torch.zeros(3, 1, 5, 4), elsewhere(3, 1, 5, 4), *torch.zeros(2, 1).long()
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", _select._stems("offramp.kernels.triton"))
def test_tensors_on_two_devices_are_named(op):
    with pytest.raises(BadArgument, match=f"{op} was given tensors on cpu and on meta; move them to one device"):
        SPLIT[op]()


def test_available():
    found = offramp.kernels.available("halting")
    assert found["torch"] is None and "no Triton kernel" in found["triton"] and "CUDA C++" in found["cuda"]
    assert "no C++ kernel" in found["cpp"] and offramp.kernels.available("head_stats")["cpp"] is None
    assert "run on the CPU, not on 'cuda'" in offramp.kernels.available("head_stats", "cuda")["cpp"]
    with pytest.raises(UnknownName, match="did you mean 'head_stats'"):
        offramp.kernels.available("headstats")


def test_an_unknown_mode(monkeypatch):
    monkeypatch.setenv("OFFRAMP_KERNELS", "tritn")
    with pytest.raises(UnknownName, match="OFFRAMP_KERNELS='tritn' is not known; did you mean 'triton'"):
        call()
