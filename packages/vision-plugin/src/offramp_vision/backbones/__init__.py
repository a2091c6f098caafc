"""Backbones of timm models, found by structure."""
