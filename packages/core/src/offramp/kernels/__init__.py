"""Numeric kernels: one op per file, signature and torch reference together."""
