"""One loss per file, found by its name."""
