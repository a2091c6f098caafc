"""Calibrators, one file each; the file's stem is the calibrator's name."""
