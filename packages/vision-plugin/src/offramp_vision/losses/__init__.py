"""Training losses for image classifiers, one per file, found by file name."""
