"""Every Triton kernel compiles for GPUs of two generations, on a machine without any."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offramp.kernels import _select

SCRIPT = Path(__file__).parents[2] / "assets" / "compile_triton.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles_to_machine_code(capability, tmp_path):
    around = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    around |= {"OFFRAMP_KERNELS": "triton", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT, capability], env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(op in done.stdout for op in _select._stems("offramp.kernels.triton")), done.stdout
    assert list(tmp_path.rglob("*.cubin"))
