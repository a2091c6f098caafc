"""Training losses, one file each; the file's stem is the loss's name."""
