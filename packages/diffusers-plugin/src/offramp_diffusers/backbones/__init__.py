"""Backbones of diffusers denoisers, found by structure."""
