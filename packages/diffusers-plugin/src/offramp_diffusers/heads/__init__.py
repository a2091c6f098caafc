"""Exit heads of denoisers, one file each; the file's stem is the head's name."""
