"""Decoding drivers: how `generate` runs when exits are enabled."""
