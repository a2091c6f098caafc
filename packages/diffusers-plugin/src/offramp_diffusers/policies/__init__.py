"""Policies over noise levels, one file each; the file's name is the policy's name."""
