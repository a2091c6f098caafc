"""Training losses for exits of images, one per file, found by file name."""
