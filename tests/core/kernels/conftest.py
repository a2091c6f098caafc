"""Every implementation of an op on every test of it: torch, C++, and Triton on a GPU or through its interpreter."""

import sys

import numpy as np
import pytest
import torch

from offramp.kernels import _select

GPU = torch.cuda.is_available()

#: unit roundoff of each type
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition("test_")[2]
        made = [name for name in ("triton", "cpp") if op in _select._stems(f"offramp.kernels.{name}")]
        metafunc.parametrize("implementation", ["torch", *made], indirect=True)


@pytest.fixture
def implementation(request, monkeypatch):
    if request.param == "triton" and sys.platform != "linux":
        pytest.skip("triton is made for Linux")
    monkeypatch.setenv("OFFRAMP_KERNELS", request.param)
    # warnings are errors in tests: a kernel that quietly became the reference fails here, each time
    monkeypatch.setattr(_select, "_said", set())
    before = np.seterr(all="ignore")  # the interpreter computes with numpy, which warns of what a GPU takes for granted
    yield request.param
    np.seterr(**before)


@pytest.fixture
def device(implementation):
    return "cuda" if GPU and implementation == "triton" else "cpu"


@pytest.fixture(params=UNIT, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def unit(dtype):
    return UNIT[dtype]
