"""Models and data from files."""
