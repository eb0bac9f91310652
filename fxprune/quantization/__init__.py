"""Quantisation to INT8: placement, observers, scales, rounding, conversion."""
