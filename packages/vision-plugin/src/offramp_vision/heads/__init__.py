"""Exit heads for images, one per file, found by file name: they read whole states of any width and layout."""
