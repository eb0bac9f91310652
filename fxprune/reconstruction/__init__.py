"""Weights that are left, changed so that values stay those of the dense program."""
