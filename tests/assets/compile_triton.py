"""Compile every Triton kernel for GPUs that need not be there: python compile_triton.py 80 90 (compute capabilities).

The ops run on tensors of the CPU, and where a kernel would be launched it is compiled to machine code instead, as it
would be for these arguments; what comes out of the ops means nothing.
"""

import sys

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from offramp import bench_cases, kernels
from offramp.kernels import _select
from offramp.kernels.head_stats import Lora, Norm


class Absent:
    """The driver of a GPU that is not there; every capability is a device of its own, with kernels of its own."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def calls():
    """One call of every op in every kind that has code of its own."""
    for cases in bench_cases.CASES.values():
        for case in cases(True, "cpu", False):
            yield case.ways["kernel"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, w = torch.ones(3, 40, dtype=dtype), torch.ones(200, 40, dtype=dtype)
        bias, norm = w[:, 0].contiguous(), Norm(x[0])
        lora = Lora(torch.ones(4, 40, dtype=dtype), torch.ones(200, 4, dtype=dtype))
        yield lambda x=x, w=w, b=bias, n=norm, lo=lora: kernels.head_stats(x, w, b, n, lo, softcap=5.0, needs=set())
        yield lambda x=x, w=w: kernels.head_stats(x, w.to(torch.int8), scale=torch.ones(200))
        yield lambda x=x, w=w: kernels.subset_logits(x, w, torch.ones(3, 5, dtype=torch.long), w[:, 0])
        yield lambda x=x: kernels.span_margin(x[None], torch.ones(1, 3, dtype=torch.bool))
        yield lambda x=x: kernels.compact(torch.ones(3, dtype=torch.bool), x, count=3)


def main(capabilities):
    """Compile for each capability and print how many kernels that were, by op."""
    made = {}
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        made.setdefault(self.fn.__module__.rpartition(".")[2], set()).add(kernel.hash)
        return kernel

    JITFunction.run = run
    _select.missing = lambda op, implementation, device: None if op in _select._stems("offramp.kernels.triton") else ""
    for capability in capabilities:
        driver.set_active(Absent(capability))
        made.clear()
        for call in calls():
            call()
        counts = ", ".join(f"{op} {len(found)}" for op, found in sorted(made.items()))
        sys.stdout.write(f"sm_{capability}: {counts}\n")
        assert set(made) == set(_select._stems("offramp.kernels.triton"))


if __name__ == "__main__":
    assert not knobs.runtime.interpret, "TRITON_INTERPRET is set: the kernels would be stepped through, not compiled"
    main([int(word) for word in sys.argv[1:]])
