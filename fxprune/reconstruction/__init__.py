"""Remaining weights, re-fitted so that values stay close to those of the dense program."""
