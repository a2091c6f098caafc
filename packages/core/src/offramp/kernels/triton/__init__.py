"""Triton kernels: one file per op, of the same name and signature as the reference; imported when one is to run."""
