"""Kernels in C++ for the CPU, compiled when OFFRAMP_KERNELS=cpp asks for one the first time."""
