"""Exit heads that need PEFT, one file each; the file's stem is the head's name."""
