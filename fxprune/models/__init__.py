"""Models from files, folders and factories."""
