"""What kernels are measured on: every way of a case computes the same."""

import torch

from offramp import bench_cases
from offramp.kernels import ops


def test_every_case_is_of_an_op_and_every_way_computes():
    assert set(bench_cases.CASES) <= set(ops())
    for cases in bench_cases.CASES.values():
        for case in cases(True, "cpu", False):
            assert case.op in ops() and "kernel" in case.ways and len(case.ways) > 1 and case.moved > 0
            for way in case.ways.values():
                way()


def test_the_ways_of_head_stats_say_the_same():
    for case in bench_cases.head_stats(True, "cpu", False):
        found, (log_top, _, entropy) = case.ways["kernel"](), case.ways["softmax"]()
        exact = 0.02 if case.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found.entropy, entropy, rtol=exact, atol=exact)
        torch.testing.assert_close(found.first - found.logsumexp, log_top[:, 0], rtol=exact, atol=exact)
        torch.testing.assert_close(case.ways["logsumexp"]()[2], entropy, rtol=exact, atol=exact)
        torch.testing.assert_close(case.ways["kernel, cpp"]().entropy, entropy, rtol=exact, atol=exact)


def test_the_ways_of_linear_say_the_same():
    for case in bench_cases.linear(True, "cpu", False):
        exact = 0.02 if case.dtype == torch.bfloat16 else 1e-5
        for way in ("kernel", "kernel, cpp"):
            for found, wanted in zip(case.ways[way](), case.ways["torch"](), strict=True):
                torch.testing.assert_close(found, wanted, rtol=exact, atol=exact)


def test_the_ways_of_verify_say_the_same():
    for case in bench_cases.verify(False, "cpu", False):
        found, (token, keep) = case.ways["kernel"](), case.ways["torch"]()
        assert torch.equal(found.token, token) and torch.equal(found.keep, keep)
