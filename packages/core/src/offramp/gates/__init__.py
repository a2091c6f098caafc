"""Gates, one file each; the file's stem is the gate's name."""
