"""Backbones by the shape of the block stack, not by model name."""
